//! A process's terminal, from the agent's side: the master of a pair that the process has made in the
//! container's own devpts.
//!
//! The pumps own the master. When the last of them closes it, the kernel hangs up the terminal: its session
//! gets SIGHUP, and reading from it ends.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Weak},
};

use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use super::StdioError;
use crate::sys::{self, terminal};

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WindowSize {
    pub(crate) width: u16,
    pub(crate) height: u16,
}

impl WindowSize {
    /// Limits both sides to what the kernel supports.
    pub(crate) fn clamped(width: u32, height: u32) -> Self {
        let side = |n| u16::try_from(n).unwrap_or(u16::MAX);
        Self { width: side(width), height: side(height) }
    }
}

/// The agent's end of the socket through which the process sends the master.
#[derive(Debug)]
pub(crate) struct ConsoleSocket(OwnedFd);

/// The descriptor of the master, which is closed with its last clone.
#[derive(Debug, Clone)]
pub(crate) struct Master(Arc<AsyncFd<OwnedFd>>);

/// Controls a terminal for as long as its pumps run.
#[derive(Debug)]
pub(crate) struct Terminal(Weak<AsyncFd<OwnedFd>>);

impl ConsoleSocket {
    pub(super) fn pair() -> Result<(Self, OwnedFd), StdioError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (ours, theirs) = pair.map_err(|err| StdioError::Terminal(err.into()))?;
        Ok((Self(ours), theirs))
    }

    /// Receives the master, which the process has sent by now.
    pub(super) fn receive(self) -> Result<(Terminal, Master), StdioError> {
        let master = receive_fd(self.0.as_fd(), MsgFlags::MSG_DONTWAIT).map_err(StdioError::NoMaster)?;
        fcntl(&master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))
            .map_err(|err| StdioError::Terminal(err.into()))?;
        let master = sys::register(master, Interest::READABLE | Interest::WRITABLE);
        let master = Arc::new(master.map_err(StdioError::Terminal)?);
        Ok((Terminal(Arc::downgrade(&master)), Master(master)))
    }
}

/// Receives one descriptor.
///
/// # Errors
/// Those of recvmsg(2); EBADMSG when the message carries no descriptor.
pub(crate) fn receive_fd(socket: BorrowedFd<'_>, flags: MsgFlags) -> Result<OwnedFd, Errno> {
    let mut bytes = [0; 256];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = cmsg_space!(i32);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | flags;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.into_iter().next()
        {
            return Ok(sys::received_fd(fd));
        }
    }
    Err(Errno::EBADMSG)
}

impl Terminal {
    /// Sets the size. False when the terminal is gone. The kernel sends SIGWINCH to the foreground processes.
    ///
    /// # Errors
    /// Those of the ioctl.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<bool, Errno> {
        match self.0.upgrade() {
            None => Ok(false),
            Some(master) => terminal::set_size(master.as_fd(), size.width, size.height).map(|()| true),
        }
    }
}

impl Master {
    /// Returns 0 when every process has closed the terminal.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?)).await;
        match read {
            Err(err) if err.raw_os_error() == Some(libc::EIO) => Ok(0),
            read => read,
        }
    }

    pub(super) async fn write_some(
        &self,
        write: impl Fn(&dyn Fn(&[u8]) -> io::Result<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let write = |fd: &OwnedFd| write(&|bytes| Ok(nix::unistd::write(fd, bytes)?));
        self.0.async_io(Interest::WRITABLE, write).await
    }
}

impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
