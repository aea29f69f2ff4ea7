//! The way to the guest agent: one control stream that the guest dials, raw streams that the host dials.
//!
//! ```text
//!   KernelVsock      AF_VSOCK sockets                                     QEMU inherits /dev/vhost-vsock
//!   VhostUserVsock   Unix sockets of vhost-device-vsock, "CONNECT <port>"  QEMU inherits a socket to the daemon
//!   Serial           yamux streams over one socket                        QEMU inherits its other end
//! ```
//! Nothing above this module knows which of them it is.

mod choose;
mod handshake;
mod kernel_vsock;
mod serial;
mod vhost_user;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use machinen_protocol::preamble::{Preamble, PreambleError, StreamKind};
use tokio::io::{AsyncRead, AsyncWrite};

pub use choose::{HostSupport, choose};

use super::argv::{PRIVATE_CID, Start};
use super::spec::{ChannelKind, VmSpec};
use crate::process::ProcessError;

/// A byte stream to or from the guest agent.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for S {}

/// One stream, whatever carries it.
pub type BoxedStream = Box<dyn Stream>;

/// The agent answers in milliseconds; one that does not for this long never will.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// Why there is no stream to the agent.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("cannot {action} for the channel to the guest")]
    Host { action: &'static str, source: io::Error },
    #[error("cannot run the daemon of the channel to the guest")]
    Daemon(#[source] ProcessError),
    #[error("the daemon of the channel to the guest ended: {0}")]
    DaemonEnded(String),
    #[error("no free vsock CID on this host after {0} tries")]
    NoCid(u32),
    #[error("the guest agent closed a stream, or is not listening")]
    Closed(#[source] io::Error),
    #[error(
        "the guest agent does not speak this version of the protocol; rebuild the guest image with `make guest-image`"
    )]
    Version(#[source] PreambleError),
    #[error("the guest agent broke the protocol")]
    Protocol(#[source] PreambleError),
    #[error("the guest agent refused a stream: too many wait for a process, or its token is in use")]
    Refused,
    #[error("the guest agent did not answer a new stream within {OPEN_DEADLINE:?}")]
    Deadline,
}

/// What the host does with the first bytes that come over a serial channel; for fuzzing.
#[cfg(fuzzing)]
pub async fn greet(socket: tokio::net::UnixStream) -> Result<BoxedStream, ChannelError> {
    let mut control = serial::Serial::over(socket).accept().await?;
    handshake::accept_control(&mut control).await?;
    Ok(control)
}

/// The host's end of the channel of one VM.
#[derive(Debug)]
pub(super) struct Channel {
    connector: Connector,
    last_token: AtomicU64,
}

#[derive(Debug)]
enum Connector {
    KernelVsock(kernel_vsock::KernelVsock),
    VhostUser(vhost_user::VhostUser),
    Serial(serial::Serial),
    /// The serial port of a template, kept open.
    Silent {
        _ours: StdUnixStream,
    },
}

/// What QEMU is started with.
#[derive(Debug)]
pub(super) struct GuestEnd {
    pub(super) fd: OwnedFd,
    pub(super) cid: u32,
}

impl Channel {
    /// Makes the channel ready to be dialled by the guest. `dir` is the VM's own directory.
    pub(super) async fn prepare(
        spec: &VmSpec,
        start: Start,
        dir: &Path,
    ) -> Result<(Self, GuestEnd), ChannelError> {
        let (connector, end) = match &spec.channel {
            ChannelKind::Serial if start == Start::Template => {
                let (ours, fd) = serial::Serial::silent()?;
                (Connector::Silent { _ours: ours }, GuestEnd { fd, cid: PRIVATE_CID })
            }
            ChannelKind::KernelVsock => {
                let (kernel, end) = kernel_vsock::KernelVsock::prepare()?;
                (Connector::KernelVsock(kernel), end)
            }
            ChannelKind::VhostUserVsock { daemon } => {
                let (user, fd) = vhost_user::VhostUser::prepare(daemon, dir, &spec.identity).await?;
                (Connector::VhostUser(user), GuestEnd { fd, cid: PRIVATE_CID })
            }
            ChannelKind::Serial => {
                let (serial, fd) = serial::Serial::prepare()?;
                (Connector::Serial(serial), GuestEnd { fd, cid: PRIVATE_CID })
            }
        };
        Ok((Self { connector, last_token: AtomicU64::new(0) }, end))
    }

    /// The control stream: waits until the guest dials, for as long as that takes. To be called once.
    pub(super) async fn accept_control(&self) -> Result<BoxedStream, ChannelError> {
        let mut stream = match &self.connector {
            Connector::KernelVsock(kernel) => kernel.accept().await?,
            Connector::VhostUser(user) => user.accept().await?,
            Connector::Serial(serial) => serial.accept().await?,
            Connector::Silent { .. } => return Err(silent()),
        };
        handshake::accept_control(&mut stream).await?;
        Ok(stream)
    }

    /// A new raw stream, registered in the agent under the token that is returned with it.
    pub(super) async fn open_stream(&self) -> Result<(u64, BoxedStream), ChannelError> {
        let token = self.last_token.fetch_add(1, Ordering::Relaxed) + 1;
        let open = async {
            let mut stream = match &self.connector {
                Connector::KernelVsock(kernel) => kernel.dial().await?,
                Connector::VhostUser(user) => user.dial().await?,
                Connector::Serial(serial) => serial.dial().await?,
                Connector::Silent { .. } => return Err(silent()),
            };
            handshake::offer(&mut stream, Preamble { kind: StreamKind::Raw, token }).await?;
            Ok((token, stream))
        };
        match tokio::time::timeout(OPEN_DEADLINE, open).await {
            Ok(result) => result,
            Err(_) => Err(ChannelError::Deadline),
        }
    }

    /// Ends what serves the channel and removes its files; nothing of it is left when this returns.
    pub(super) async fn close(&self) -> Result<(), ChannelError> {
        match &self.connector {
            Connector::KernelVsock(_) | Connector::Serial(_) | Connector::Silent { .. } => Ok(()),
            Connector::VhostUser(user) => user.close().await,
        }
    }
}

fn silent() -> ChannelError {
    ChannelError::Closed(io::ErrorKind::NotConnected.into())
}
