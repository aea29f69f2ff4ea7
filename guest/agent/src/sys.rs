//! The only unsafe code of the agent: system calls that no crate wraps, each a few lines.

pub(crate) mod terminal;
pub(crate) mod tracing;

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    unistd::{ForkResult, Pid},
};
use tokio::io::{Interest, unix::AsyncFd};

/// How a child has ended (wait(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitStatus {
    Exited(u8),
    Signaled(u8),
}

/// Reaps one ended child of any kind, without waiting.
///
/// nix's wrapper fails for real-time signals, which containers may use.
///
/// # Errors
/// ECHILD when there is no child at all.
pub(crate) fn reap_any() -> Result<Option<(Pid, WaitStatus)>, Errno> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the kernel to write to.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) })?;
    if pid == 0 {
        return Ok(None);
    }
    let status = if libc::WIFSIGNALED(status) {
        WaitStatus::Signaled(low_byte(libc::WTERMSIG(status)))
    } else {
        WaitStatus::Exited(low_byte(libc::WEXITSTATUS(status)))
    };
    Ok(Some((Pid::from_raw(pid), status)))
}

fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}

/// kill(2) with any signal number, real-time ones included.
///
/// # Errors
/// Those of kill(2).
pub(crate) fn kill_raw(pid: Pid, signal: i32) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::kill(pid.as_raw(), signal) }).map(drop)
}

/// The scheduling policy of a thread, without flags: a constant of the kernel's include/uapi/linux/sched.h.
///
/// # Errors
/// There is no such thread.
pub(crate) fn scheduling_policy(thread: Pid) -> Result<i32, Errno> {
    const SCHED_RESET_ON_FORK: i32 = 0x4000_0000;
    // SAFETY: no memory is involved.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_getscheduler, thread.as_raw()) })
        .map(|policy| i32::try_from(policy).unwrap_or(i32::MAX) & !SCHED_RESET_ON_FORK)
}

/// Has the files of a mount that is attached nowhere belong to the users that the ids of a user namespace stand for outside
/// of it (mount_setattr(2), MOUNT_ATTR_IDMAP).
///
/// # Errors
/// Those of mount_setattr(2).
pub(crate) fn map_owners(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
    const ID_MAPPED: u64 = 0x10_0000;
    let namespace = namespace.as_raw_fd().cast_unsigned().into();
    // struct mount_attr: attributes to set and to clear, propagation, user namespace.
    let attributes = [ID_MAPPED, 0, 0, namespace];
    // SAFETY: the kernel reads an empty C string, and the structure, whose size is passed with it.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    })
    .map(drop)
}

/// fork(2).
///
/// # Errors
/// Those of fork(2).
pub(crate) fn fork() -> Result<ForkResult, Errno> {
    // SAFETY: called while the process has one thread only, so the child may do anything.
    unsafe { nix::unistd::fork() }
}

/// Forks a child of this process's parent (clone(2), CLONE_PARENT).
///
/// # Errors
/// Those of clone(2); EINVAL in the init process of a pid namespace.
pub(crate) fn fork_sibling() -> Result<ForkResult, Errno> {
    // SAFETY: no new stack and no shared memory are asked for, so this is fork(2) with another parent; it is
    // called while the process has one thread only.
    let pid = Errno::result(unsafe {
        libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0)
    })?;
    fork_result(pid)
}

/// Forks a child of this process's parent into another cgroup (clone(2), CLONE_PARENT and CLONE_INTO_CGROUP).
///
/// # Errors
/// Those of clone3(2); EBUSY for a cgroup whose children have controllers.
pub(crate) fn fork_sibling_into(cgroup: BorrowedFd<'_>) -> Result<ForkResult, Errno> {
    /// From linux/sched.h; the libc crate's constant has too narrow a type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut args = [0_u64; 11];
    args[0] = CLONE_INTO_CGROUP | u64::from(libc::CLONE_PARENT.cast_unsigned());
    args[10] = cgroup.as_raw_fd().cast_unsigned().into();
    // SAFETY: the kernel reads a clone_args, eleven words of which the first are flags and the last the
    // cgroup; without a stack and shared memory this is fork(2), and it is called while the process has one
    // thread only.
    let pid = Errno::result(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })?;
    fork_result(pid)
}

fn fork_result(pid: libc::c_long) -> Result<ForkResult, Errno> {
    match i32::try_from(pid) {
        Ok(0) => Ok(ForkResult::Child),
        Ok(pid) => Ok(ForkResult::Parent { child: Pid::from_raw(pid) }),
        Err(_) => Err(Errno::EOVERFLOW),
    }
}

/// Opens a process that is known to exist (pidfd_open(2)).
///
/// # Errors
/// Those of pidfd_open(2).
pub(crate) fn open_process(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is involved.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The file that a UNIX socket was bound to, whatever its name is now, as a descriptor that only leads to it
/// (O_PATH).
///
/// # Errors
/// ENOENT for a socket that is not bound to a file.
pub(crate) fn file_of_socket(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    /// Of the kernel's include/uapi/linux/un.h.
    const SIOCUNIXFILE: libc::Ioctl = 0x89e0;
    // SAFETY: SIOCUNIXFILE takes no argument.
    let fd = Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) })?;
    // SAFETY: the kernel has made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ends a forked process without running its parent's exit handlers (_exit(2)).
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: always allowed.
    unsafe { libc::_exit(code) }
}

/// Registers a descriptor with the runtime.
///
/// # Errors
/// The kernel cannot poll `inner`.
pub(crate) fn register<T: AsFd + AsRawFd>(inner: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: a type that lends its descriptor safely owns it for as long as it lives, and the AsyncFd owns
    // that.
    Ok(unsafe { AsyncFd::register_with_interest(inner, interest) }?)
}

/// Takes over a descriptor that was inherited over exec.
///
/// # Errors
/// EBADF when `fd` is not open.
pub(crate) fn inherited_fd(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_GETFD has no effect on memory, whatever the number.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open (just checked) and its number came from the command line, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over a descriptor that was just received over a socket (unix(7), SCM_RIGHTS).
pub(crate) fn received_fd(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made it for this process, and the caller is the only one it was given to.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Sets the default action for every signal and an empty mask, as programs expect.
///
/// The Rust runtime ignores SIGPIPE, and an ignored signal stays ignored over exec.
pub(crate) fn reset_signals() {
    // The kernel's own struct sigaction: handler (SIG_DFL is 0), flags, restorer, mask.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: the default action runs no code of ours. The C library's wrapper would refuse the two
        // signals that it keeps to itself. SIGKILL and SIGSTOP answer an error, as they should.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, 0, 8) };
    }
    // SAFETY: sigset_t is plain data that sigemptyset fills; the old mask is not asked for.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Credits fresh bytes to the kernel's random number generator and makes it use them at once (random(4)).
///
/// # Errors
/// Those of the ioctls; EPERM without CAP_SYS_ADMIN.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; 512],
    }
    let mut info = PoolInfo { entropy_count: 0, buf_size: 0, buf: [0; 512] };
    for chunk in bytes.chunks(info.buf.len()) {
        let size = i32::try_from(chunk.len()).map_err(|_| Errno::EINVAL)?;
        info.entropy_count = size * 8;
        info.buf_size = size;
        info.buf[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: RNDADDENTROPY reads a rand_pool_info, which `info` lays out, and no more of it than
        // buf_size.
        Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}

/// Brings the loopback interface up (netdevice(7)); the kernel gives it 127.0.0.1 and ::1 then.
///
/// # Errors
/// Those of the ioctl.
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: ifreq is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// Attaches `file` to a free loop device, which the kernel detaches after its last use (loop(4)).
///
/// # Errors
/// Those of the ioctls, and of opening the device.
pub(crate) fn attach_loop(file: BorrowedFd<'_>, read_only: bool) -> io::Result<(u32, OwnedFd)> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
    const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
    const LO_FLAGS_READ_ONLY: u32 = 1;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    #[repr(C)]
    struct LoopConfig {
        fd: u32,
        block_size: u32,
        info: LoopInfo,
        reserved: [u64; 8],
    }
    #[repr(C)]
    struct LoopInfo {
        start: [u64; 5],
        number_encrypt: [u32; 3],
        flags: u32,
        names: [u8; 160],
        init: [u64; 2],
    }
    let control = std::fs::File::open("/dev/loop-control")?;
    loop {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
        let device =
            std::fs::OpenOptions::new().read(true).write(!read_only).open(format!("/dev/loop{number}"))?;
        let mut info =
            LoopInfo { start: [0; 5], number_encrypt: [0; 3], flags: 0, names: [0; 160], init: [0; 2] };
        info.flags = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
        let config =
            LoopConfig { fd: file.as_raw_fd().cast_unsigned(), block_size: 0, info, reserved: [0; 8] };
        // SAFETY: LOOP_CONFIGURE reads a loop_config, which `config` lays out.
        match Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }) {
            Ok(_) => return Ok((number.cast_unsigned(), device.into())),
            // Another process took this number between the two calls.
            Err(Errno::EBUSY) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

/// Reads a mapping of a file into memory, and gives this process its pages (madvise(2)).
///
/// # Errors
/// Nothing is mapped there, or the file cannot be read.
pub(crate) fn populate(start: u64, length: usize) -> Result<(), Errno> {
    let start = std::ptr::without_provenance_mut(usize::try_from(start).map_err(|_| Errno::EFAULT)?);
    // SAFETY: the pages are only read, so nothing that this process can see changes.
    Errno::result(unsafe { libc::madvise(start, length, libc::MADV_POPULATE_READ) }).map(drop)
}

/// Loads a BPF program that decides about devices (bpf(2)). A signal interrupts the kernel's check of the program, which is
/// begun again then.
///
/// # Errors
/// Those of bpf(2); EAGAIN if signals arrive all the time.
pub(crate) fn load_device_filter(code: &[u64]) -> Result<OwnedFd, Errno> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    const TRIES: usize = 10;
    #[repr(C)]
    struct Load {
        kind: u32,
        length: u32,
        code: u64,
        license: u64,
        log: [u64; 2],
    }
    let length = u32::try_from(code.len()).map_err(|_| Errno::E2BIG)?;
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        length,
        code: code.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        log: [0; 2],
    };
    let attempt = || {
        // SAFETY: the kernel reads `length` instructions of eight bytes and the license, both of which outlive
        // the call.
        Errno::result(unsafe {
            libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>())
        })
    };
    let mut more = 1..TRIES;
    let program = loop {
        match attempt() {
            Err(Errno::EAGAIN) if more.next().is_some() => {}
            result => break result?,
        }
    };
    let program = i32::try_from(program).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has made the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}

/// Attaches such a program to a cgroup, with which the attachment disappears (bpf(2)).
///
/// # Errors
/// Those of bpf(2).
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Errno> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        kind: u32,
        flags: u32,
    }
    let attach = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads the struct.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>())
    })?;
    Ok(())
}

/// Completes the file system of `root` on its disk and blocks its writers, or lets them continue. Neither is
/// an error if it is so already.
///
/// # Errors
/// Those of the ioctls FIFREEZE and FITHAW: ENOTSUPP where the file system cannot be frozen.
pub(crate) fn freeze_file_system(root: BorrowedFd<'_>, frozen: bool) -> io::Result<()> {
    const FIFREEZE: libc::Ioctl = 0xc004_5877;
    const FITHAW: libc::Ioctl = 0xc004_5878;
    let (request, already) = if frozen { (FIFREEZE, Errno::EBUSY) } else { (FITHAW, Errno::EINVAL) };
    // SAFETY: neither takes an argument, whatever its number says.
    match Errno::result(unsafe { libc::ioctl(root.as_raw_fd(), request) }) {
        Ok(_) => Ok(()),
        Err(error) if error == already => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The number that the server of a FUSE file system has given to a file: the first part of the file's handle (the kernel's
/// fuse_encode_fh).
///
/// # Errors
/// Those of name_to_handle_at(2); EOPNOTSUPP if the file is on another file system.
pub(crate) fn fuse_node(file: BorrowedFd<'_>) -> io::Result<u64> {
    const FILEID_INO64_GEN: i32 = 0x81;
    #[repr(C)]
    struct Handle {
        length: u32,
        kind: i32,
        words: [u32; 3],
    }
    let mut handle = Handle { length: size_of::<[u32; 3]>() as u32, kind: 0, words: [0; 3] };
    let mut mount = 0_i32;
    // SAFETY: the kernel reads an empty name, and writes a file_handle with room for `length` bytes and a number.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    match handle {
        Handle { kind: FILEID_INO64_GEN, words: [high, low, _], .. } => {
            Ok(u64::from(high) << 32 | u64::from(low))
        }
        _ => Err(Errno::EOPNOTSUPP.into()),
    }
}

/// A piece of a file, and its place on the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileExtent {
    pub(crate) logical: u64,
    pub(crate) physical: u64,
    pub(crate) length: u64,
    /// The piece reads as zeros, whatever the disk holds.
    pub(crate) zero: bool,
    /// This is the last piece of the file.
    pub(crate) last: bool,
}

/// Writes back a part of a file, and waits for the disk (sync_file_range(2)).
///
/// # Errors
/// Those of writing.
pub(crate) fn write_back(file: BorrowedFd<'_>, from: u64, length: u64) -> io::Result<()> {
    let number = |value: u64| libc::off64_t::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes no pointers.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), number(from)?, number(length)?, flags) };
    Ok(Errno::result(done).map(drop)?)
}

/// Locates the first pieces of a part of a file that was written back (kernel document
/// filesystems/fiemap.rst).
///
/// # Errors
/// Those of the ioctl; EIO for a piece without a place of its own on the disk.
pub(crate) fn file_extents(file: BorrowedFd<'_>, part: Range<u64>) -> io::Result<Vec<FileExtent>> {
    const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
    const LAST: u32 = 1;
    const UNWRITTEN: u32 = 0x800;
    /// The place is unknown, or not allocated yet; or the data is encoded, stored in metadata, or shares a
    /// block with other files.
    const NOT_PLAIN: u32 = 0x2 | 0x4 | 0x8 | 0x200 | 0x400;
    const COUNT: usize = 256;
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Extent {
        logical: u64,
        physical: u64,
        length: u64,
        reserved64: [u64; 2],
        flags: u32,
        reserved: [u32; 3],
    }
    #[repr(C)]
    struct Map {
        start: u64,
        length: u64,
        flags: u32,
        mapped: u32,
        count: u32,
        reserved: u32,
        extents: [Extent; COUNT],
    }
    let none = Extent { logical: 0, physical: 0, length: 0, reserved64: [0; 2], flags: 0, reserved: [0; 3] };
    let mut map = Map {
        start: part.start,
        length: part.end - part.start,
        flags: 0,
        mapped: 0,
        count: COUNT as u32,
        reserved: 0,
        extents: [none; COUNT],
    };
    // SAFETY: FS_IOC_FIEMAP reads and writes a fiemap with room for `count` extents, which `map` lays out.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) })?;
    let mapped = map.extents.iter().take(map.mapped as usize);
    mapped
        .map(|extent| {
            let zero = extent.flags & UNWRITTEN != 0;
            if !zero && extent.flags & NOT_PLAIN != 0 {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(FileExtent {
                logical: extent.logical,
                physical: extent.physical,
                length: extent.length,
                zero,
                last: extent.flags & LAST != 0,
            })
        })
        .collect()
}
