//! The connection to the host: one control stream that the agent dials, and raw streams that the host dials.
//!
//! ```text
//!   Vsock    control: connect(CID 2, CONTROL_PORT)     raw: accept on STREAM_PORT
//!   Serial   both are yamux streams over one byte stream (a virtserialport, or a socket in tests)
//! ```
//! No other module knows which of the two it is.

mod control;
mod port;
mod preamble;
mod serial;
mod unclaimed;
mod vsock;
pub(crate) mod wake;

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use machinen_protocol::{
    SERIAL_PORT_NAME,
    preamble::{PreambleError, Wake},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::Compat;
use tokio_vsock::VsockStream;

pub(crate) use self::{
    control::{ControlStream, ControlWatch},
    unclaimed::Unclaimed,
};
use crate::{boot::ChannelSource, uevent::UeventError};

#[derive(Debug)]
pub(crate) enum Channel {
    /// What has woken this VM, if it is a clone.
    Vsock(Option<Wake>),
    Serial(serial::Serial),
}

/// One stream to the host.
#[derive(Debug)]
pub(crate) enum Stream {
    Vsock(VsockStream),
    Serial(Compat<yamux::Stream>),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("cannot listen on vsock port {port}")]
    Listen { port: u32, source: io::Error },
    #[error("cannot read the VM's vsock address")]
    Cid(#[source] io::Error),
    #[error("cannot dial the host's vsock port {port}")]
    Dial { port: u32, source: io::Error },
    #[error("no virtserialport named {name}")]
    NoPort { name: &'static str, source: UeventError },
    #[error("cannot open the serial port")]
    OpenPort(#[source] io::Error),
    #[error("cannot wait to be woken")]
    Wake(#[source] io::Error),
    #[error("the serial channel has failed")]
    Serial(#[source] yamux::ConnectionError),
    #[error("the host has closed the serial channel")]
    SerialClosed,
    #[error("cannot greet the host")]
    Greet(#[source] io::Error),
    #[error("the host does not accept this agent")]
    Refused,
    #[error("the host's answer to the greeting is invalid")]
    Preamble(#[source] PreambleError),
}

/// The guest's end of the channel before the first byte: a template may have this much.
#[derive(Debug)]
pub(crate) enum Unopened {
    Vsock(vsock::Listener),
    Serial(port::Port),
}

impl Unopened {
    /// Opens the device.
    ///
    /// # Errors
    /// The device is missing or cannot be used.
    pub(crate) async fn open(source: ChannelSource) -> Result<Self, ChannelError> {
        match source {
            ChannelSource::Vsock => vsock::Listener::bind().map(Self::Vsock),
            ChannelSource::Port => port::open(SERIAL_PORT_NAME).await.map(Self::Serial),
            ChannelSource::Stream(fd) => {
                port::Port::new(fd.into()).map(Self::Serial).map_err(ChannelError::OpenPort)
            }
        }
    }
}

impl Channel {
    /// Accepts raw streams from now on, into `unclaimed`. The agent does so before the host can know that the
    /// agent runs, so that no stream is refused for being early.
    pub(crate) fn open(unopened: Unopened, unclaimed: &Unclaimed, wake: Option<Wake>) -> Self {
        match unopened {
            Unopened::Vsock(listener) => {
                listener.accept_into(unclaimed.clone());
                Self::Vsock(wake)
            }
            // yamux sends bytes at once, and a clone has another host than its template.
            Unopened::Serial(port) => Self::Serial(serial::Serial::over(port, unclaimed.clone())),
        }
    }

    /// Dials the host's control port and greets the host, which takes this as "the guest is ready".
    ///
    /// # Errors
    /// The host does not answer, or has another version.
    pub(crate) async fn dial_control(&self) -> Result<(ControlStream, ControlWatch), ChannelError> {
        let stream = match self {
            Self::Vsock(wake) => vsock::dial(*wake).await?,
            Self::Serial(serial) => {
                let mut stream = serial.dial().await?;
                preamble::greet(&mut stream).await?;
                stream
            }
        };
        Ok(ControlStream::new(stream))
    }

    /// Returns when everything that was written before has been handed to the host.
    pub(crate) async fn flush(&self) {
        if let Self::Serial(serial) = self {
            serial.close().await;
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Serial(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Vsock(stream) => {
                Pin::new(stream).poll_write(cx, &bytes[..bytes.len().min(vsock::MAX_WRITE)])
            }
            Self::Serial(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Self::Serial(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Serial(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
