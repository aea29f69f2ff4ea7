//! A virtserialport as an asynchronous byte stream.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use super::ChannelError;
use crate::{sys, uevent::Uevents};

/// The host announces ports and their names after the driver has started.
const DEADLINE: Duration = Duration::from_secs(5);
const PORTS: &str = "/sys/class/virtio-ports";

#[derive(Debug)]
pub(crate) struct Port {
    file: AsyncFd<File>,
}

/// Opens a port by its name, and waits until the kernel knows the name.
pub(super) async fn open(name: &'static str) -> Result<Port, ChannelError> {
    // The port is nearly always there already; then no subscription is needed.
    let path = match find(name) {
        Some(path) => path,
        None => {
            let missing = |source| ChannelError::NoPort { name, source };
            let uevents = Uevents::subscribe().map_err(missing)?;
            uevents.find(DEADLINE, || find(name)).await.map_err(missing)?
        }
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(ChannelError::OpenPort)?;
    until_connected(file.as_fd()).map_err(ChannelError::OpenPort)?;
    Port::new(file).map_err(ChannelError::OpenPort)
}

/// Waits until the kernel knows that the host has opened the other end. It learns that after the port's name;
/// until then the port looks as if the host had closed it. Blocking is fine, since the message is on its way.
fn until_connected(port: BorrowedFd<'_>) -> io::Result<()> {
    let mut ports = [PollFd::new(port, PollFlags::POLLOUT)];
    poll(&mut ports, PollTimeout::ZERO)?;
    if ports[0].revents().is_some_and(|seen| !seen.contains(PollFlags::POLLHUP)) {
        return Ok(());
    }
    // Edge-triggered, because the hang-up is pending all the time.
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(port, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 0))?;
    let timeout = EpollTimeout::try_from(DEADLINE).map_err(io::Error::other)?;
    loop {
        let mut events = [EpollEvent::empty()];
        match epoll.wait(&mut events, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if events[0].events().contains(EpollFlags::EPOLLOUT) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

fn find(wanted: &str) -> Option<PathBuf> {
    fs::read_dir(PORTS).ok()?.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == wanted).then(|| Path::new("/dev").join(entry.file_name()))
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

    /// One direction of a port cannot be shut down; dropping the port closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
