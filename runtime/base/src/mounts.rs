//! Mounts that a running child process is shown in a mount namespace of its own.
//!
//! The child cannot mount anything itself. A thread of this process enters the child's namespace for a moment, and
//! ends there: a thread cannot return, because its root and working directory are lost.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::AtFlags,
    mount::{OpenTreeFlags, open_tree},
};

use crate::sys::{pidfd, root};

/// How a tree of the host is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeOptions {
    /// With what is mounted below it.
    pub recursive: bool,
    /// Nothing in the tree can be written.
    pub read_only: bool,
    /// What the host mounts in the tree later appears in it.
    pub follows_host: bool,
}

/// Makes a mount of the file or directory that `source` is open on. It is in no mount namespace yet. Set-user-ID
/// bits, device nodes and programs have no effect in it.
///
/// # Errors
/// The errors of open_tree(2) and mount_setattr(2), of Linux 5.12.
pub fn clone_tree(source: BorrowedFd<'_>, options: TreeOptions) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::from_bits_retain(AtFlags::EMPTY_PATH.bits());
    if options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(source, "", flags)?;
    root::set_tree_attributes(tree.as_fd(), options.read_only, options.follows_host)?;
    Ok(tree)
}

/// Shows the files of a mount that is in no namespace yet as those of the users to which the user namespace maps their
/// owners; with `recursive` also those of the mounts below it.
///
/// # Errors
/// The errors of mount_setattr(2), as EINVAL where the file system knows no such mounts.
pub fn map_users(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    root::map_users(tree, namespace, recursive)
}

/// The mount namespace of a child process.
#[derive(Debug)]
pub struct ChildMounts {
    /// Refers to this process only, also when its pid is that of another one.
    child: OwnedFd,
}

impl ChildMounts {
    /// The namespace of the process `pid`, a child that has not been reaped.
    ///
    /// # Errors
    /// The errors of pidfd_open(2).
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self { child: pidfd::open(pid)? })
    }

    /// Runs `work` in the namespace, with its root as the root directory. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be entered, for example because the child has ended; or those of `work`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let entered = move || {
            // A namespace of mounts can be entered only by a thread that shares its root with no other.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&self.child, CloneFlags::CLONE_NEWNS)?;
            work()
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("mounts".to_owned()).spawn_scoped(scope, entered)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
        })
    }
}
