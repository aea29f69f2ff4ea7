//! The guest's localhost, for processes of the host that connect or send to the localhost of the pod's network namespace.
//!
//! ```text
//!   listen(2), bind(2) ──tracing──> this agent ──report──> host, which listens on the same port in the namespace
//!   connect(2) on the host ──> host ──raw stream──> this agent ──> 127.0.0.1:PORT, as on a host
//! ```
//! Only sockets of the containers' namespace count. A program in a container finds the agent's end of a connection at an
//! address of localhost, where it would find the process of the host without a VM.

mod datagrams;
mod events;
pub(crate) mod relay;

use std::{collections::BTreeSet, convert::Infallible, io, net::SocketAddr, time::Duration};

use machinen_netlink::{NetlinkError, listening_on_localhost};
use machinen_protocol::{
    api::{DialLocalhostRequest, WatchListenersRequest},
    error::{ErrorKind, HasKind, chain},
    localhost::{LocalPort, encode_report},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Mutex,
    task::JoinSet,
    time::timeout,
};

use self::events::SocketEvents;
use crate::{
    channel::{Stream, Unclaimed},
    console,
};

/// A process that does not accept connections fills its queue; then the kernel tries again for minutes.
const CONNECTED_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum LocalhostError {
    #[error("no stream has the token {0}")]
    NoStream(u64),
    #[error("{0} is not a port")]
    Port(u32),
    #[error("the kernel is not the agent's own")]
    ForeignKernel,
    #[error("cannot find out when processes listen")]
    Events(#[source] io::Error),
    #[error("cannot find out which ports processes listen on")]
    List(#[from] NetlinkError),
    #[error("cannot connect to {address}")]
    Connect { address: SocketAddr, source: io::Error },
}

impl HasKind for LocalhostError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoStream(_) => ErrorKind::NotFound,
            Self::Port(_) => ErrorKind::InvalidArgument,
            _ => ErrorKind::FailedPrecondition,
        }
    }
}

/// The reports to the host.
#[derive(Debug, Default)]
pub(crate) struct Localhost {
    running: Mutex<JoinSet<()>>,
    /// Events that a template has subscribed to and no host asks for yet.
    subscribed: Mutex<Option<SocketEvents>>,
}

impl Localhost {
    /// Ends the reports to a host that has gone, and subscribes to the kernel's events, so that a clone finds it done: the kernel
    /// makes a thousand files for it, and changes its own code.
    ///
    /// # Errors
    /// The kernel has no such events.
    pub(crate) async fn warm_up(&self) -> Result<(), LocalhostError> {
        self.running.lock().await.shutdown().await;
        let events = SocketEvents::subscribe().map_err(LocalhostError::Events)?;
        *self.subscribed.lock().await = Some(events);
        Ok(())
    }

    /// Does what `WatchListeners` asks for.
    ///
    /// # Errors
    /// The stream does not exist, or the kernel has no such events.
    pub(crate) async fn watch(
        &self,
        unclaimed: &Unclaimed,
        request: &WatchListenersRequest,
        owns_kernel: bool,
    ) -> Result<(), LocalhostError> {
        let stream = claim(unclaimed, request.stream).await?;
        if !owns_kernel {
            return Err(LocalhostError::ForeignKernel);
        }
        let mut running = self.running.lock().await;
        running.shutdown().await;
        let events = match self.subscribed.lock().await.take() {
            Some(events) => events,
            None => SocketEvents::subscribe().map_err(LocalhostError::Events)?,
        };
        listening_on_localhost()?;
        running.spawn(async {
            let Err(error) = report(stream, events).await;
            let error = chain(&error);
            console::say(&format!(
                "the host does not learn any more on which ports containers listen: {error}"
            ));
        });
        Ok(())
    }
}

/// Does what `DialLocalhost` asks for.
///
/// # Errors
/// The stream does not exist, or nothing accepts the connection.
pub(crate) async fn dial(
    unclaimed: &Unclaimed,
    request: &DialLocalhostRequest,
) -> Result<(), LocalhostError> {
    let stream = claim(unclaimed, request.stream).await?;
    let port = u16::try_from(request.port).ok().filter(|&port| port != 0);
    let port = port.ok_or(LocalhostError::Port(request.port))?;
    let port = LocalPort { udp: request.udp, ipv6: request.ipv6, port };
    let address = SocketAddr::new(port.address(), port.port);
    if port.udp {
        let socket = datagrams::socket(address).await;
        let socket = socket.map_err(|source| LocalhostError::Connect { address, source })?;
        tokio::spawn(datagrams::relay(socket, stream));
        return Ok(());
    }
    let connected = timeout(CONNECTED_WITHIN, TcpStream::connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let socket = connected.map_err(|source| LocalhostError::Connect { address, source })?;
    tokio::spawn(relay::relay(socket, stream));
    Ok(())
}

async fn claim(unclaimed: &Unclaimed, token: u64) -> Result<Stream, LocalhostError> {
    unclaimed.claim(token).await.ok_or(LocalhostError::NoStream(token))
}

/// Sends a report now and after each change.
async fn report(stream: Stream, events: SocketEvents) -> Result<Infallible, LocalhostError> {
    let mut stream = stream;
    let mut reported = None;
    loop {
        let ports: BTreeSet<_> = listening_on_localhost()?.into_iter().collect();
        if reported.as_ref() != Some(&ports) {
            let sent = async {
                stream.write_all(&encode_report(&ports)).await?;
                stream.flush().await
            };
            sent.await.map_err(LocalhostError::Events)?;
            reported = Some(ports);
        }
        tokio::select! {
            changed = events.changed() => changed.map_err(LocalhostError::Events)?,
            // The host sends nothing.
            _ = stream.read_u8() => return Err(LocalhostError::Events(io::ErrorKind::BrokenPipe.into())),
        }
    }
}
