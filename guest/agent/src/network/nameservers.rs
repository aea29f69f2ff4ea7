//! Sends what containers send to a nameserver of the host's namespace to the host.
//!
//! ```text
//!   container ──> 127.0.0.11:53 ──(nftables)──> 127.0.0.11:PORT, this agent ──raw stream──> host
//! ```
//! The agent listens on ports that the kernel chooses, so that a program in a container can itself listen on port 53. It
//! keeps them when the host opens another stream: the kernel leads what a socket sends to the port of its first packet.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use machinen_netlink::{
    NetlinkError,
    nat::{self, Redirection},
};
use machinen_protocol::{
    api::ForwardNameserversRequest,
    error::{ErrorKind, HasKind},
    nameservers::{ANSWERED_WITHIN, MAX_NAMESERVERS, MAX_OPEN, PORT, QueryHeader, ReplyHeader, Transport},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::{
    channel::{Stream, Unclaimed},
    console,
};

/// How long a connection may be without a query, and a reply without its end.
const IDLE: Duration = Duration::from_secs(10);
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 32;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NameserverError {
    #[error("{0:?} is not an address of the loopback network 127.0.0.0/8")]
    Address(Vec<u8>),
    #[error("{0} nameservers are given; there can be {MAX_NAMESERVERS}")]
    TooMany(usize),
    #[error("no stream has the token {0}")]
    NoStream(u64),
    #[error("cannot listen on {address}")]
    Listen { address: Ipv4Addr, source: io::Error },
    #[error(transparent)]
    Kernel(#[from] NetlinkError),
}

impl HasKind for NameserverError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Address(_) | Self::TooMany(_) => ErrorKind::InvalidArgument,
            Self::NoStream(_) => ErrorKind::NotFound,
            Self::Listen { .. } | Self::Kernel(_) => ErrorKind::FailedPrecondition,
        }
    }
}

/// The nameservers that containers reach through the host.
#[derive(Debug, Default)]
pub(crate) struct Nameservers(tokio::sync::Mutex<Forwarding>);

#[derive(Debug, Default)]
struct Forwarding {
    running: JoinSet<()>,
    /// The ports on which the agent has listened last.
    ports: HashMap<Ipv4Addr, ListenerPorts>,
}

#[derive(Debug, Clone, Copy, Default)]
struct ListenerPorts {
    udp: u16,
    tcp: u16,
}

impl Nameservers {
    /// Does what `ForwardNameservers` asks for.
    ///
    /// # Errors
    /// An address is not valid, the stream does not exist, or the kernel refuses. Then nothing is sent to the host.
    pub(crate) async fn forward(
        &self,
        unclaimed: &Unclaimed,
        request: &ForwardNameserversRequest,
    ) -> Result<(), NameserverError> {
        let mut forwarding = self.0.lock().await;
        forwarding.running.shutdown().await;
        let stream = match request.nameservers.is_empty() {
            true => None,
            false => {
                Some(unclaimed.claim(request.stream).await.ok_or(NameserverError::NoStream(request.stream))?)
            }
        };
        let listeners = listen(&request.nameservers, &forwarding.ports).await?;
        forwarding.ports = listeners.iter().map(|listener| (listener.address, listener.ports)).collect();
        nat::redirect(&listeners.iter().map(Listener::redirections).collect::<Vec<_>>().concat())?;
        if let Some(stream) = stream {
            forwarding.running.spawn(run(listeners, stream));
        }
        Ok(())
    }
}

/// The sockets that stand for one nameserver.
#[derive(Debug)]
struct Listener {
    address: Ipv4Addr,
    ports: ListenerPorts,
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Listener {
    /// Listens on the ports, or on others if another process has them by now; 0: any.
    async fn bind(address: Ipv4Addr, ports: ListenerPorts) -> io::Result<Self> {
        let udp = match UdpSocket::bind((address, ports.udp)).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => UdpSocket::bind((address, 0)).await,
            bound => bound,
        }?;
        let tcp = match TcpListener::bind((address, ports.tcp)).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => TcpListener::bind((address, 0)).await,
            bound => bound,
        }?;
        let ports = ListenerPorts { udp: udp.local_addr()?.port(), tcp: tcp.local_addr()?.port() };
        Ok(Self { address, ports, udp, tcp })
    }

    fn redirections(&self) -> Vec<Redirection> {
        let to = [(nat::Transport::Udp, self.ports.udp), (nat::Transport::Tcp, self.ports.tcp)];
        let address = self.address;
        to.map(|(transport, to)| Redirection { address, transport, from: PORT, to }).into()
    }
}

async fn listen(
    addresses: &[Vec<u8>],
    ports: &HashMap<Ipv4Addr, ListenerPorts>,
) -> Result<Vec<Listener>, NameserverError> {
    if addresses.len() > MAX_NAMESERVERS {
        return Err(NameserverError::TooMany(addresses.len()));
    }
    let mut listeners = Vec::new();
    for bytes in addresses {
        let address = <[u8; 4]>::try_from(bytes.as_slice()).map(Ipv4Addr::from).ok();
        let address = address.filter(Ipv4Addr::is_loopback);
        let address = address.ok_or_else(|| NameserverError::Address(bytes.clone()))?;
        let listener = Listener::bind(address, ports.get(&address).copied().unwrap_or_default()).await;
        listeners.push(listener.map_err(|source| NameserverError::Listen { address, source })?);
    }
    Ok(listeners)
}

async fn run(listeners: Vec<Listener>, stream: Stream) {
    let (reader, writer) = split(stream);
    let (send, queries) = mpsc::channel(MAX_OPEN);
    let host = Host(Arc::new(HostQueue {
        send,
        waiting: Mutex::default(),
        last_id: AtomicU32::new(0),
        open: Semaphore::new(MAX_OPEN),
    }));
    let mut tasks = JoinSet::new();
    for (number, listener) in (0..).zip(listeners) {
        tasks.spawn(serve_udp(listener.udp, host.clone(), number));
        tasks.spawn(serve_tcp(listener.tcp, host.clone(), number));
    }
    tasks.spawn(send_queries(writer, queries));
    tasks.spawn(take_replies(reader, host));
    // None of them ends by itself.
    if let Some(Ok(Err(error))) = tasks.join_next().await {
        console::say(&format!("nameservers of the host cannot be reached any more: {error}"));
    }
}

/// The way to the host. Every query gets an id, under which its reply is found.
#[derive(Debug, Clone)]
struct Host(Arc<HostQueue>);

#[derive(Debug)]
struct HostQueue {
    send: mpsc::Sender<Vec<u8>>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<Vec<u8>>>>,
    last_id: AtomicU32,
    open: Semaphore,
}

impl Host {
    /// Sends a query, and waits for the reply. Returns None if no reply arrives in time, or too many queries wait.
    async fn ask(&self, nameserver: u8, transport: Transport, query: &[u8]) -> Option<Vec<u8>> {
        let length = u16::try_from(query.len()).ok()?;
        let Self(queue) = self;
        // A client asks again.
        let _open = queue.open.try_acquire().ok()?;
        let id = queue.last_id.fetch_add(1, Ordering::Relaxed);
        let header = QueryHeader { id, nameserver, transport, length };
        let (sender, reply) = oneshot::channel();
        self.waiting().insert(id, sender);
        let asked = async {
            queue.send.send([&header.encode(), query].concat()).await.ok()?;
            reply.await.ok()
        };
        let reply = timeout(ANSWERED_WITHIN + IDLE, asked).await.ok().flatten();
        self.waiting().remove(&id);
        reply.filter(|reply| !reply.is_empty())
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<Vec<u8>>>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn send_queries(mut stream: WriteHalf<Stream>, mut queries: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(query) = queries.recv().await {
        stream.write_all(&query).await?;
        stream.flush().await?;
    }
    Ok(())
}

async fn take_replies(mut stream: ReadHalf<Stream>, host: Host) -> io::Result<()> {
    loop {
        let mut header = [0; ReplyHeader::SIZE];
        stream.read_exact(&mut header).await?;
        let header = ReplyHeader::decode(header);
        let mut reply = vec![0; header.length.into()];
        stream.read_exact(&mut reply).await?;
        let waiting = host.waiting().remove(&header.id);
        if let Some(waiting) = waiting {
            // Nothing waits any more if the time for the query has passed.
            drop(waiting.send(reply));
        }
    }
}

async fn serve_udp(socket: UdpSocket, host: Host, nameserver: u8) -> io::Result<()> {
    let socket = Arc::new(socket);
    let mut datagram = vec![0; usize::from(u16::MAX)];
    loop {
        let (length, from) = match socket.recv_from(&mut datagram).await {
            // The kernel reports that an earlier reply has reached no process.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            received => received?,
        };
        let (query, socket, host) = (datagram[..length].to_vec(), Arc::clone(&socket), host.clone());
        tokio::spawn(async move { answer_datagram(&socket, &host, nameserver, &query, from).await });
    }
}

async fn answer_datagram(socket: &UdpSocket, host: &Host, nameserver: u8, query: &[u8], from: SocketAddr) {
    if let Some(reply) = host.ask(nameserver, Transport::Udp, query).await {
        // The process that has asked may have ended.
        drop(socket.send_to(&reply, from).await);
    }
}

async fn serve_tcp(listener: TcpListener, host: Host, nameserver: u8) -> io::Result<()> {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = Arc::clone(&connections).acquire_owned().await.map_err(io::Error::other)?;
        let (connection, _) = match listener.accept().await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            accepted => accepted?,
        };
        let host = host.clone();
        tokio::spawn(async move {
            // The connection ends with the first error, whichever side has caused it.
            drop(answer_connection(connection, &host, nameserver).await);
            drop(permit);
        });
    }
}

/// Answers the queries of a connection, each of which follows its length (RFC 1035, section 4.2.2).
async fn answer_connection(mut connection: TcpStream, host: &Host, nameserver: u8) -> io::Result<()> {
    loop {
        let query = timeout(IDLE, async {
            let mut query = vec![0; connection.read_u16().await?.into()];
            connection.read_exact(&mut query).await?;
            Ok::<_, io::Error>(query)
        });
        let query = query.await??;
        let Some(reply) = host.ask(nameserver, Transport::Tcp, &query).await else { return Ok(()) };
        let length = u16::try_from(reply.len()).map_err(io::Error::other)?;
        let message = [&length.to_be_bytes(), &*reply].concat();
        timeout(IDLE, connection.write_all(&message)).await??;
    }
}
