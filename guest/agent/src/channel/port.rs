//! The virtserialport as an asynchronous byte stream.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use machinen_protocol::SERIAL_PORT_NAME;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use super::ChannelError;
use crate::{sys, uevent::Uevents};

/// Ports and their names arrive from the host after the driver has started.
const DEADLINE: Duration = Duration::from_secs(5);
const PORTS: &str = "/sys/class/virtio-ports";

#[derive(Debug)]
pub(super) struct Port {
    file: AsyncFd<File>,
}

/// Opens the agent's port, waiting for the kernel to learn its name.
pub(super) async fn open() -> Result<Port, ChannelError> {
    // The port is nearly always there: the subscription is only paid for when it is not.
    let path = match find() {
        Some(path) => path,
        None => {
            let uevents = Uevents::subscribe().map_err(ChannelError::NoPort)?;
            uevents.find(DEADLINE, find).await.map_err(ChannelError::NoPort)?
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(ChannelError::OpenPort)?;
    Port::new(file).map_err(ChannelError::OpenPort)
}

fn find() -> Option<PathBuf> {
    fs::read_dir(PORTS).ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == SERIAL_PORT_NAME).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

impl Port {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(file.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(file.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        fcntl(file.as_fd(), FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        Ok(Self { file: sys::register(file, Interest::READABLE | Interest::WRITABLE)? })
    }
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.file.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            if let Ok(result) = guard.try_io(|file| file.get_ref().read(space)) {
                buf.advance(result?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.file.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|file| file.get_ref().write(bytes)) {
                return Poll::Ready(result);
            }
        }
    }

    /// The driver hands every write to the host at once.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A port has no direction to shut; dropping it closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
