//! A new root directory for a child process, between fork and exec.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

/// The mounts of a root directory. None of them is attached to the file system tree before the child attaches them.
#[derive(Debug)]
pub(crate) struct RootMounts {
    /// The root itself, with a directory or file at each place where something is mounted.
    pub(crate) root: OwnedFd,
    /// What is mounted below the root, in this order, and where: paths without a leading slash.
    pub(crate) mounts: Vec<(OwnedFd, CString)>,
    /// Absolute, in the new root.
    pub(crate) working_dir: CString,
}

/// The directory at which the new root is mounted for a moment. Every host has it.
const TEMPORARY_MOUNT: &CStr = c"/proc";
/// The place in the new root that shows the child to itself.
const PROC: &CStr = c"proc";

/// The mount's attributes that [`set_attributes`] sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttributes {
    /// Nothing can be written.
    pub(crate) read_only: bool,
    /// Device nodes can be opened.
    pub(crate) devices: bool,
    /// Programs and libraries can be executed.
    pub(crate) executable: bool,
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const READ_ONLY: u64 = 0x1;
const NO_SET_USER_ID: u64 = 0x2;
const NO_DEVICES: u64 = 0x4;
const NO_EXECUTION: u64 = 0x8;
const MAPPED: u64 = 0x10_0000;

/// Changes the attributes of a mount (mount_setattr(2), Linux 5.12): set-user-ID bits have no effect, and no mount of the
/// host propagates into it.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, attributes: MountAttributes) -> io::Result<()> {
    let MountAttributes { read_only, devices, executable } = attributes;
    let mut set = NO_SET_USER_ID;
    for (wanted, flag) in [(read_only, READ_ONLY), (!devices, NO_DEVICES), (!executable, NO_EXECUTION)] {
        if wanted {
            set |= flag;
        }
    }
    change(mount, libc::AT_EMPTY_PATH, set, libc::MS_PRIVATE)
}

/// Changes a mount and all mounts below it: set-user-ID bits, device nodes and programs have no effect. With
/// `follows_host`, mounts of the host propagate into the tree.
pub(crate) fn set_tree_attributes(
    mount: BorrowedFd<'_>,
    read_only: bool,
    follows_host: bool,
) -> io::Result<()> {
    let set = NO_SET_USER_ID | NO_DEVICES | NO_EXECUTION | if read_only { READ_ONLY } else { 0 };
    let propagation = if follows_host { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    change(mount, libc::AT_EMPTY_PATH | libc::AT_RECURSIVE, set, propagation)
}

/// Gives the files of a mount, and with `recursive` those of all mounts below it, to the users to which the user namespace
/// maps their owners.
pub(crate) fn map_users(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let user_namespace = u64::from(namespace.as_raw_fd().cast_unsigned());
    apply(mount, flags, MountAttr { set: MAPPED, clear: 0, propagation: 0, user_namespace })
}

fn change(mount: BorrowedFd<'_>, flags: libc::c_int, set: u64, propagation: u64) -> io::Result<()> {
    apply(mount, flags, MountAttr { set, clear: 0, propagation, user_namespace: 0 })
}

fn apply(mount: BorrowedFd<'_>, flags: libc::c_int, attr: MountAttr) -> io::Result<()> {
    // SAFETY: mount_setattr(2) reads an empty C string and the structure, whose size is passed with it.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// Makes `root` the root directory of this process, which has a mount namespace of its own. Makes system calls only.
pub(super) fn enter(root: &RootMounts) -> io::Result<()> {
    attach(&root.root, TEMPORARY_MOUNT)?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::fchdir(root.root.as_raw_fd()) }.into())?;
    for (mount, at) in &root.mounts {
        attach(mount, at)?;
    }
    attach(&own_proc()?, PROC)?;
    // The old root is mounted on top of the new one then, and detached from there (pivot_root(2)).
    // SAFETY: both paths are C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into())?;
    // SAFETY: the path is a C string.
    check(unsafe { libc::chdir(root.working_dir.as_ptr()) }.into())?;
    Ok(())
}

/// Attaches a mount at a path that is relative to the working directory.
fn attach(mount: &OwnedFd, at: &CStr) -> io::Result<()> {
    const FROM_EMPTY_PATH: libc::c_uint = 4;
    let (from, here) = (mount.as_raw_fd(), libc::AT_FDCWD);
    // SAFETY: both paths are C strings.
    check(unsafe {
        libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), here, at.as_ptr(), FROM_EMPTY_PATH)
    })
    .map(drop)
}

/// A proc(5) that has only the processes of this process's pid namespace, and nothing of the kernel.
fn own_proc() -> io::Result<OwnedFd> {
    const CLOSE_ON_EXEC: libc::c_uint = 1;
    const SET_STRING: libc::c_uint = 1;
    const CREATE: libc::c_uint = 6;
    // SAFETY: the name is a C string.
    let context = check(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), CLOSE_ON_EXEC) })?;
    let context = owned(context);
    let configure = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: key and value are null or C strings that live as long as the program.
        check(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) })
    };
    configure(SET_STRING, c"subset".as_ptr(), c"pid".as_ptr())?;
    configure(CREATE, std::ptr::null(), std::ptr::null())?;
    let attributes = NO_SET_USER_ID | NO_DEVICES | NO_EXECUTION;
    // SAFETY: no memory is involved.
    let mount = check(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOSE_ON_EXEC, attributes as libc::c_uint)
    })?;
    Ok(owned(mount))
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the caller has just got this descriptor from the kernel, and it has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
