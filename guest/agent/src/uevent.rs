//! Waits for a device of the VM: the kernel's uevents show when to look, sysfs shows what is there.
//!
//! The content of an event is never used, so a forged event costs only a look.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// The multicast group on which the kernel itself sends.
const KERNEL_GROUP: u32 = 1;

#[derive(Debug)]
pub(crate) struct Uevents {
    socket: AsyncFd<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum UeventError {
    #[error("cannot listen to the kernel's device events")]
    Listen(#[source] io::Error),
    #[error("no device event after {} s", .0.as_secs())]
    Deadline(Duration),
}

impl Uevents {
    /// Subscribes. To be called before the first look at sysfs, so that no event is missed.
    ///
    /// # Errors
    /// Those of the socket calls.
    pub(crate) fn subscribe() -> Result<Self, UeventError> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let make = || -> io::Result<_> {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Datagram,
                flags,
                SockProtocol::NetlinkKObjectUEvent,
            )?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
            sys::register(socket, Interest::READABLE)
        };
        make().map(|socket| Self { socket }).map_err(UeventError::Listen)
    }

    /// Calls `look` now and after every event until it returns something.
    ///
    /// # Errors
    /// `look` has found nothing before the deadline.
    pub(crate) async fn find<T>(
        &self,
        deadline: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T, UeventError> {
        let search = async {
            loop {
                if let Some(found) = look() {
                    return Ok(found);
                }
                self.event().await.map_err(UeventError::Listen)?;
            }
        };
        tokio::time::timeout(deadline, search).await.map_err(|_| UeventError::Deadline(deadline))?
    }

    /// Waits for at least one event and takes all that have arrived.
    async fn event(&self) -> io::Result<()> {
        let mut seen = false;
        loop {
            let mut guard = self.socket.readable().await?;
            loop {
                let mut buffer = [0; 256];
                match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    // ENOBUFS: events were lost, which counts as an event.
                    Ok(_) | Err(Errno::ENOBUFS) => seen = true,
                    Err(Errno::EAGAIN) => break,
                    Err(Errno::EINTR) => {}
                    Err(err) => return Err(err.into()),
                }
            }
            guard.clear_ready();
            if seen {
                return Ok(());
            }
        }
    }
}
