//! Every unsafe call of the library.

pub(crate) mod child;
pub mod inherit;
pub(crate) mod pidfd;
pub(crate) mod socket;
pub(crate) mod vhost;

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Watches a descriptor for readiness; must be called inside a tokio runtime.
pub(crate) fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps its descriptor open and unchanged until it is dropped.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}
