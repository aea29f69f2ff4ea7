//! The connection to the guest agent: one control stream that the guest dials, raw streams that the host
//! dials.
//!
//! ```text
//!   KernelVsock      AF_VSOCK sockets                      QEMU inherits /dev/vhost-vsock
//!   VhostUserVsock   Unix sockets of vhost-device-vsock    QEMU inherits a socket to the daemon
//!   Serial           yamux streams over one socket         QEMU inherits its other end
//! ```
//! No code above this module depends on which of them is used.

mod choose;
mod daemon_jail;
mod handshake;
mod joined;
mod kernel_vsock;
mod serial;
mod vhost_user;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use machinen_base::{fs::FileError, process::ProcessError};
use machinen_protocol::preamble::{Preamble, PreambleError, StreamKind};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    qemu::argv::{PRIVATE_CID, Start},
    spec::{ChannelKind, VmSpec},
};

pub use choose::{ChannelMode, HostSupport, choose_channel};

/// A byte stream to or from the guest agent.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> ByteStream for S {}

/// A stream of any channel.
pub type BoxedStream = Box<dyn ByteStream>;

/// The agent answers in milliseconds; one that does not answer within this time is taken to hang.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// Why a stream to the agent cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum VmChannelError {
    /// The host cannot make or use a socket, pipe or file of the channel.
    #[error("cannot {action} for the channel to the guest")]
    Host {
        /// What failed: a verb that fits the text, such as `make a pipe`.
        action: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// There is no user for vhost-device-vsock to run as.
    #[error("cannot find a user for the daemon of the channel to the guest")]
    User(#[source] FileError),
    /// vhost-device-vsock cannot be started or ended.
    #[error("cannot run the daemon of the channel to the guest")]
    Daemon(#[source] ProcessError),
    /// vhost-device-vsock ended during the start of the VM; this is its status and what it printed.
    #[error("the daemon of the channel to the guest ended: {0}")]
    DaemonEnded(String),
    /// All context ids that were tried belong to other VMs; this is their number.
    #[error("no free vsock CID on this host after {0} tries")]
    NoCid(u32),
    /// The guest has ended a stream, or accepts none.
    #[error("the guest agent closed a stream, or is not listening")]
    Closed(#[source] io::Error),
    /// The agent in the guest image is of another version than the host.
    #[error(
        "the guest agent does not speak this version of the protocol; rebuild the guest image with `make guest-image`"
    )]
    Version(#[source] PreambleError),
    /// The first bytes of a stream are not valid.
    #[error("the guest agent broke the protocol")]
    Protocol(#[source] PreambleError),
    /// The agent does not accept the stream.
    #[error("the guest agent refused a stream: too many wait for a process, or its token is in use")]
    Refused,
    /// The agent took too long to accept the stream.
    #[error("the guest agent did not answer a new stream within {OPEN_DEADLINE:?}")]
    Deadline,
}

/// What the host does with the first bytes that arrive over a serial channel; for fuzzing.
#[cfg(fuzzing)]
pub async fn greet(socket: tokio::net::UnixStream) -> Result<BoxedStream, VmChannelError> {
    let mut control = serial::SerialChannel::over(socket).accept().await?;
    handshake::accept_control(&mut control).await?;
    Ok(control)
}

/// The host's end of the channel of one VM.
#[derive(Debug)]
pub(super) struct VmChannel {
    connector: Connector,
    last_token: AtomicU64,
}

#[derive(Debug)]
enum Connector {
    KernelVsock(kernel_vsock::KernelVsock),
    VhostUser(vhost_user::VhostUser),
    Serial(serial::SerialChannel),
    /// The serial port of a template: it is kept open, and nothing is sent.
    Silent {
        _ours: StdUnixStream,
    },
}

/// What QEMU needs of the channel when it starts.
#[derive(Debug)]
pub(super) struct GuestEnd {
    pub(super) fd: OwnedFd,
    pub(super) cid: u32,
}

impl VmChannel {
    /// Prepares the channel, so that the guest can dial it. `dir` is the VM's own directory.
    pub(super) async fn prepare(
        spec: &VmSpec,
        start: Start,
        dir: &Path,
    ) -> Result<(Self, GuestEnd), VmChannelError> {
        let (connector, end) = match &spec.channel {
            ChannelKind::Serial if start == Start::Template => {
                let (ours, fd) = serial::SerialChannel::socket_pair()?;
                (Connector::Silent { _ours: ours }, GuestEnd { fd, cid: PRIVATE_CID })
            }
            ChannelKind::KernelVsock => {
                let (kernel, end) = kernel_vsock::KernelVsock::prepare()?;
                (Connector::KernelVsock(kernel), end)
            }
            ChannelKind::VhostUserVsock { daemon } => {
                let (user, fd) = vhost_user::VhostUser::prepare(daemon, dir).await?;
                (Connector::VhostUser(user), GuestEnd { fd, cid: PRIVATE_CID })
            }
            ChannelKind::Serial => {
                let (serial, fd) = serial::SerialChannel::prepare()?;
                (Connector::Serial(serial), GuestEnd { fd, cid: PRIVATE_CID })
            }
        };
        Ok((Self { connector, last_token: AtomicU64::new(0) }, end))
    }

    /// Waits, without a deadline, until the guest dials the control stream. To be called once.
    pub(super) async fn accept_control(&self) -> Result<BoxedStream, VmChannelError> {
        match &self.connector {
            Connector::KernelVsock(kernel) => {
                let control = handshake::control(|| kernel.accept()).await?;
                kernel.stop_listening();
                Ok(control)
            }
            Connector::VhostUser(user) => {
                let control = handshake::control(|| user.accept()).await?;
                user.stop_listening();
                Ok(control)
            }
            Connector::Serial(serial) => {
                let mut control = serial.accept().await?;
                handshake::accept_control(&mut control).await?;
                Ok(control)
            }
            Connector::Silent { .. } => Err(silent()),
        }
    }

    /// The AF_VSOCK port that a clone's agent is to dial; 0 if the channel has none.
    pub(super) fn control_port(&self) -> u32 {
        match &self.connector {
            Connector::KernelVsock(kernel) => kernel.control_port(),
            Connector::VhostUser(_) | Connector::Serial(_) | Connector::Silent { .. } => 0,
        }
    }

    /// A new raw stream, registered in the agent under the token that is returned with it.
    pub(super) async fn open_stream(&self) -> Result<(u64, BoxedStream), VmChannelError> {
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
            Err(_) => Err(VmChannelError::Deadline),
        }
    }

    /// Ends the channel's daemon, if there is one, and removes its files. Nothing of it is left when this
    /// returns.
    pub(super) async fn close(&self) -> Result<(), VmChannelError> {
        match &self.connector {
            Connector::KernelVsock(kernel) => {
                kernel.close();
                Ok(())
            }
            Connector::Serial(_) | Connector::Silent { .. } => Ok(()),
            Connector::VhostUser(user) => user.close().await,
        }
    }
}

fn silent() -> VmChannelError {
    VmChannelError::Closed(io::ErrorKind::NotConnected.into())
}
