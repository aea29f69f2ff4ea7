//! Every unsafe call of the library is in this module.

pub(crate) mod child;
pub mod inherit;
pub mod kvm;
mod lease;
pub mod limits;
pub(crate) mod pidfd;
pub(crate) mod priority;
pub(crate) mod ptrace;
pub(crate) mod root;
pub mod socket;
pub mod tap;
pub(crate) mod twin;
pub mod vhost;

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

pub use child::{drop_capabilities, ignore_user_for_capabilities, keep_only_capabilities};
pub use lease::take_read_lease;

/// Watches a descriptor for readiness; must be called inside a tokio runtime.
pub fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its descriptor open and unchanged until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// Watches a descriptor for exceptional conditions (POLLPRI); must be called inside a tokio runtime.
pub(crate) fn async_fd_of_priority(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its descriptor open and unchanged until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }.map_err(io::Error::from)
}

/// A close-on-exec duplicate under the first free number that is not below `number`.
pub(crate) fn duplicate_from(fd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) with F_DUPFD_CLOEXEC takes and returns integers.
    let fd = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Restores the default action of SIGPIPE, which Rust's start-up changes: a program that only prints ends
/// when its output is closed.
pub fn end_on_broken_pipe() {
    // SAFETY: signal(2) with the default action runs no code of this program.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Ignores SIGCHLD, so that the kernel reaps the children of this process.
pub(crate) fn ignore_children() -> io::Result<()> {
    // SAFETY: signal(2) that ignores a signal runs no code of this program.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Fills `buffer` from the kernel's random number generator (getrandom(2)).
pub fn random(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => filled += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}
