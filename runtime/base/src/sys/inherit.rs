//! Descriptors that the process was started with.

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes over a descriptor that the parent passed on under `number`; it is not passed on further.
///
/// Call it once for a number, before anything else opens descriptors.
///
/// # Errors
/// There is no such descriptor.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the borrow ends with this block, and fcntl(2) on a number that is not open only answers EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: the descriptor is open, as the call above has shown, and the caller takes each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
