//! What a twin is given by the process that makes it.

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags},
    eventfd::{EfdFlags, EventFd},
    socket::{ControlMessage, MsgFlags, sendmsg},
};

use std::os::fd::AsRawFd as _;

/// An eventfd with this counter (eventfd(2)).
pub(crate) fn event(count: u32, flags: i32, semaphore: bool) -> io::Result<OwnedFd> {
    let mut flags = EfdFlags::from_bits_truncate(flags) | EfdFlags::EFD_CLOEXEC;
    flags.set(EfdFlags::EFD_SEMAPHORE, semaphore);
    Ok(EventFd::from_value_and_flags(count, flags)?.into())
}

/// A descriptor that receives these signals of the process that reads it (signalfd(2)).
pub(crate) fn signals(mask: u64, flags: i32) -> io::Result<OwnedFd> {
    let flags = flags | libc::SFD_CLOEXEC;
    // SAFETY: signalfd4(2) reads as many bytes as it is told, which are those of `mask`.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, size_of::<u64>(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// An epoll instance without members.
pub(crate) fn epoll() -> io::Result<OwnedFd> {
    Ok(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?.0)
}

/// Sends descriptors to the other end of a socket (unix(7)).
pub(crate) fn send(socket: BorrowedFd<'_>, descriptors: &[RawFd]) -> io::Result<()> {
    let message = [ControlMessage::ScmRights(descriptors)];
    let byte = [io::IoSlice::new(&[0])];
    sendmsg::<()>(socket.as_raw_fd(), &byte, &message, MsgFlags::empty(), None)?;
    Ok(())
}
