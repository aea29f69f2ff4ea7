//! What a child process does to itself between fork and exec.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
};

use seccompiler::BpfProgram;

/// How a process is related to the one that starts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bond {
    /// The process is killed when the thread that started it ends.
    Child,
    /// The process has a session of its own and outlives the one that started it.
    Detached,
    /// The program replaces the current one; the process stays the same.
    Replacement,
}

/// Plain data, complete before the fork: the child of a process with threads may only make system calls.
#[derive(Debug)]
pub(crate) struct ChildSetup {
    /// Pid of the process that forks.
    pub(crate) parent: u32,
    /// How the child is related to the process that forks.
    pub(crate) bond: Bond,
    /// A network namespace to enter.
    pub(crate) join_netns: Option<OwnedFd>,
    /// CLONE_NEW* flags.
    pub(crate) unshare: libc::c_int,
    /// uid, gid, supplementary groups.
    pub(crate) identity: Option<(u32, u32, Vec<u32>)>,
    /// Empty every capability set, the bounding set included.
    pub(crate) drop_capabilities: bool,
    /// Set PR_SET_NO_NEW_PRIVS (prctl(2)).
    pub(crate) no_new_privileges: bool,
    /// Limit core files to 0 bytes.
    pub(crate) no_core: bool,
    /// Decimal digits.
    pub(crate) oom_score_adj: Option<Vec<u8>>,
    /// A filter of system calls.
    pub(crate) filter: Option<BpfProgram>,
}

/// Makes `command` apply `setup` to itself just before it executes.
pub(crate) fn on_fork(command: &mut Command, setup: ChildSetup) {
    // SAFETY: `apply` only makes system calls on data that was complete before the fork; it does not allocate
    // or lock.
    unsafe { command.pre_exec(move || apply(&setup)) };
}

/// Makes system calls only: see [`ChildSetup`].
fn apply(setup: &ChildSetup) -> io::Result<()> {
    match setup.bond {
        // A process group of its own: Ctrl-C at the terminal is for machinen, which then ends its children
        // in order.
        // SAFETY: no memory is involved.
        Bond::Child => check(unsafe { libc::setpgid(0, 0) }.into())?,
        // SAFETY: no memory is involved.
        Bond::Detached => check(unsafe { libc::setsid() }.into())?,
        Bond::Replacement => {}
    }
    close_on_exec()?;
    if setup.no_core {
        forbid_core_files()?;
    }
    if let Some(value) = &setup.oom_score_adj {
        set_oom_score_adj(value)?;
    }
    enter_namespaces(setup)?;
    if setup.drop_capabilities {
        drop_bounding_set()?;
    }
    if let Some((uid, gid, groups)) = &setup.identity {
        change_identity(*uid, *gid, groups)?;
    }
    if setup.drop_capabilities {
        drop_capability_sets()?;
    }
    if setup.no_new_privileges {
        // SAFETY: no memory is involved.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    }
    if let Some(filter) = &setup.filter {
        seccompiler::apply_filter(filter).map_err(|_| io::Error::last_os_error())?;
    }
    if setup.bond == Bond::Child {
        // After the change of identity, which clears the signal.
        die_with_parent(setup.parent)?;
    }
    Ok(())
}

/// Marks all descriptors but the standard streams. Only those that are moved to their numbers after this are
/// inherited.
fn close_on_exec() -> io::Result<()> {
    // SAFETY: no memory is involved, and no descriptor is closed before the program is executed.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) })
}

fn forbid_core_files() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit(2) reads the structure, which lives until the call returns.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }.into())
}

fn set_oom_score_adj(value: &[u8]) -> io::Result<()> {
    // SAFETY: the path is a C string, which lives as long as the program.
    let fd = unsafe { libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd.into())?;
    // SAFETY: write(2) reads as many bytes as `value` has.
    check(unsafe { libc::write(fd, value.as_ptr().cast(), value.len()) } as i64)?;
    // SAFETY: this function has opened the descriptor, and nothing else uses it.
    unsafe { libc::close(fd) };
    Ok(())
}

fn enter_namespaces(setup: &ChildSetup) -> io::Result<()> {
    if let Some(netns) = &setup.join_netns {
        // SAFETY: no memory is involved; `netns` keeps its descriptor open.
        check(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) }.into())?;
    }
    if setup.unshare != 0 {
        // SAFETY: no memory is involved. The flags are those of namespaces, and the child has one thread.
        check(unsafe { libc::unshare(setup.unshare) }.into())?;
    }
    if setup.unshare & libc::CLONE_NEWNS != 0 {
        let flags = libc::MS_SLAVE | libc::MS_REC;
        let none = std::ptr::null();
        // SAFETY: the target is a C string; mount(2) reads no other text to change how mounts propagate.
        check(unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) }.into())?;
    }
    Ok(())
}

/// Makes raw system calls, because the C library's functions would try to change threads that do not exist in
/// this child.
fn change_identity(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: setgroups(2) reads as many numbers as `groups` has.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// Has the kernel kill this process when the thread that started it ends, and ends now if `parent` has ended
/// before.
fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into())?;
    // SAFETY: no memory is involved.
    if unsafe { libc::getppid() } as u32 != parent {
        // SAFETY: _exit(2) does not return and runs no code of this program.
        unsafe { libc::_exit(libc::EXIT_FAILURE) };
    }
    Ok(())
}

/// Gives up every capability of this process, for good.
pub fn drop_capabilities() -> io::Result<()> {
    drop_bounding_set()?;
    drop_capability_sets()
}

fn drop_bounding_set() -> io::Result<()> {
    // The kernel answers EINVAL for the first capability that it does not know.
    for capability in 0..64 {
        // SAFETY: no memory is involved.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 {
                break;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Empties the ambient, inheritable, permitted and effective sets (capabilities(7)).
fn drop_capability_sets() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [0_u32; 6];
    // SAFETY: no memory is involved.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) }.into())?;
    // SAFETY: version 3 of capset(2) reads one header and two triples of 32-bit words.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
