//! Standard streams on descriptors that the caller has passed on: the container's own streams of a command
//! line, which may be of any kind.
//!
//! ```text
//!   pipe, fifo, terminal   opened again, and watched for readiness
//!   socket                 each call is told not to block, and readiness is watched
//!   file, /dev/null        never blocks for long: used as it is, by a worker thread
//! ```
//! Other processes may have the same open file description, as a shell has its terminal. So the description
//! is never set to non-blocking mode, and the position in a file stays shared with them.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    pin::Pin,
    task::{Context, Poll, ready},
};

use machinen_base::sys;
use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::{AsyncReadExt, AsyncWrite, Interest, unix::AsyncFd};

/// A stream on a descriptor of the caller, for one direction.
#[derive(Debug)]
pub struct InheritedStream(Descriptor);

#[derive(Debug)]
enum Descriptor {
    /// A pipe, or a device that can be watched, as a terminal. It has an open file description of its own.
    Watched(AsyncFd<OwnedFd>),
    Socket(AsyncFd<OwnedFd>),
    File(tokio::fs::File),
}

impl InheritedStream {
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The errors of open(2) for a pipe or device. A pipe whose writers have ended can still be read.
    pub(super) fn reader(fd: impl AsFd) -> io::Result<Self> {
        Self::open(fd, OpenOptions::new().read(true))
    }

    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The errors of open(2) for a pipe or device, which include that a named fifo has no reader any more.
    pub(super) fn writer(fd: impl AsFd) -> io::Result<Self> {
        Self::open(fd, OpenOptions::new().write(true))
    }

    fn open(fd: impl AsFd, options: &mut OpenOptions) -> io::Result<Self> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        let file = File::from(fd);
        let kind = file.metadata()?.file_type();
        if kind.is_socket() {
            return Ok(Self(Descriptor::Socket(sys::async_fd(file.into())?)));
        }
        if !kind.is_fifo() && !kind.is_char_device() {
            return Ok(Self(Descriptor::File(tokio::fs::File::from_std(file))));
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let own = options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY).open(path)?;
        match sys::async_fd(own.into()) {
            Ok(watched) => Ok(Self(Descriptor::Watched(watched))),
            // epoll(7) refuses devices that are always ready, as /dev/null.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(Self(Descriptor::File(tokio::fs::File::from_std(file))))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until there may be something to read.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match &self.0 {
            Descriptor::Watched(fd) | Descriptor::Socket(fd) => {
                fd.readable().await?.retain_ready();
                Ok(())
            }
            Descriptor::File(_) => Ok(()),
        }
    }

    /// Reads what is there; 0 at the end. Cancelling this loses nothing.
    ///
    /// # Errors
    /// The errors of read(2): there is nothing to read now, or the stream is broken.
    pub(super) async fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Descriptor::Watched(fd) => {
                let read = fd.try_io(Interest::READABLE, |fd| Ok(nix::unistd::read(fd, buffer)?));
                match read {
                    // So a terminal reports that its other side is closed.
                    Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
                    read => read,
                }
            }
            Descriptor::Socket(fd) => {
                fd.try_io(Interest::READABLE, |fd| Ok(recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?))
            }
            Descriptor::File(file) => file.read(buffer).await,
        }
    }
}

impl AsyncWrite for InheritedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let write = |fd: &OwnedFd| Ok(nix::unistd::write(fd, bytes)?);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let send = |fd: &OwnedFd| Ok(send(fd.as_raw_fd(), bytes, flags)?);
        match &mut self.get_mut().0 {
            Descriptor::Watched(fd) => poll_io(fd, cx, write),
            Descriptor::Socket(fd) => poll_io(fd, cx, send),
            Descriptor::File(file) => Pin::new(file).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Descriptor::Watched(_) | Descriptor::Socket(_) => Poll::Ready(Ok(())),
            Descriptor::File(file) => Pin::new(file).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

/// Repeats an output until it does not have to wait.
fn poll_io(
    fd: &AsyncFd<OwnedFd>,
    cx: &mut Context<'_>,
    output: impl Fn(&OwnedFd) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        let mut writable = ready!(fd.poll_write_ready(cx))?;
        if let Ok(result) = writable.try_io(|fd| output(fd.get_ref())) {
            return Poll::Ready(result);
        }
    }
}
