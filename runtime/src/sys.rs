//! Every unsafe call of the library.

pub(crate) mod child;
pub mod inherit;
pub(crate) mod kvm;
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

/// Fills `buffer` from the kernel's random number generator (getrandom(2)).
pub(crate) fn random(buffer: &mut [u8]) -> io::Result<()> {
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
