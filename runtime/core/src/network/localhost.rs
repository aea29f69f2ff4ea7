//! The localhost of a pod's network namespace leads to the guest's localhost.
//!
//! ```text
//!   process in the namespace ──TCP──> 127.0.0.1 or ::1, this process ──raw stream──> agent ──TCP──> container
//!                              UDP: datagrams.rs
//! ```
//! The guest reports the ports on which it listens, and exactly on those this process listens in the namespace. So the
//! kernel refuses connections to other ports at once, and a port on which another process of the namespace listens stays
//! that process's. The guest can take ports of this localhost, as a container without a VM can, and answer connections
//! that are made to them. It can make none.
//!
//! The same ports are served on the addresses that the guest has of the namespace. Only processes of the namespace get
//! there, such as Podman's port handler for ordinary users (rootlessport): what arrives from elsewhere is redirected to the
//! guest before.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdTcpListener, UdpSocket as StdUdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use machinen_base::netns;
use machinen_protocol::localhost::{
    LocalPort, MAX_CONNECTIONS, MAX_FRAME, REPORT_HEADER, decode_report, report_length,
};
use machinen_vm::BoxedStream;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use super::datagrams;

/// On how many addresses of each kind the ports are served. A namespace has one or two.
const MAX_ADDRESSES: usize = 8;

/// How long the guest may take to close a stream whose two directions have ended.
pub(crate) const CLOSED_WITHIN: Duration = Duration::from_secs(10);

type DialFuture = Pin<Box<dyn Future<Output = io::Result<BoxedStream>> + Send>>;

/// Connects a new stream with a port of the guest.
pub(super) type Dial = Arc<dyn Fn(LocalPort) -> DialFuture + Send + Sync>;

/// The addresses of the namespace that the guest has, at this moment.
pub(super) type OwnAddresses =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<IpAddr>> + Send>> + Send + Sync>;

/// Listens on the ports of the reports that arrive on the stream, until the stream ends. Connections that exist then
/// are not affected.
pub(super) async fn serve(
    mut reports: BoxedStream,
    namespace: Arc<OwnedFd>,
    own: OwnAddresses,
    dial: Dial,
) -> io::Error {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut server = LocalServer { namespace, dial, connections, listening: HashMap::new() };
    loop {
        let updated = match read_report(&mut reports).await {
            Ok(wanted) => server.update(places(&wanted, &own().await)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = updated {
            return error;
        }
    }
}

/// Where a port of the guest's localhost is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Place {
    address: IpAddr,
    port: LocalPort,
}

/// The places of the ports on localhost and on the addresses that the guest has.
fn places(ports: &BTreeSet<LocalPort>, own: &[IpAddr]) -> BTreeSet<Place> {
    let of_port = |port: LocalPort| {
        let own = own.iter().copied().filter(move |address| address.is_ipv6() == port.ipv6);
        own.take(MAX_ADDRESSES).chain([port.address()]).map(move |address| Place { address, port })
    };
    ports.iter().copied().flat_map(of_port).collect()
}

pub(super) async fn read_report(stream: &mut BoxedStream) -> io::Result<BTreeSet<LocalPort>> {
    let mut header = [0; REPORT_HEADER];
    stream.read_exact(&mut header).await?;
    let mut ports = vec![0; report_length(header).map_err(io::Error::other)?];
    stream.read_exact(&mut ports).await?;
    decode_report(&ports).map_err(io::Error::other)
}

struct LocalServer {
    namespace: Arc<OwnedFd>,
    dial: Dial,
    connections: Arc<Semaphore>,
    listening: HashMap<Place, ListeningTask>,
}

/// Accepts connections until it is dropped.
struct ListeningTask(JoinHandle<()>);

impl Drop for ListeningTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LocalServer {
    /// Listens at these places and no others. A port that another process has is left to that process.
    async fn update(&mut self, wanted: BTreeSet<Place>) -> io::Result<()> {
        self.listening.retain(|place, task| wanted.contains(place) && !task.0.is_finished());
        let new: Vec<_> = wanted.into_iter().filter(|place| !self.listening.contains_key(place)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let namespace = Arc::clone(&self.namespace);
        let bind = move || netns::inside(namespace.as_fd(), || Ok(bind_all(new)));
        let bound = spawn_blocking(bind).await.map_err(io::Error::other)??;
        for (place, listener) in bound {
            let port = place.port;
            let (dial, connections) = (Arc::clone(&self.dial), Arc::clone(&self.connections));
            let serving = match listener {
                BoundSocket::Tcp(listener) => {
                    tokio::spawn(accept(TcpListener::from_std(listener)?, port, dial, connections))
                }
                BoundSocket::Udp(socket) => {
                    tokio::spawn(datagrams::serve(UdpSocket::from_std(socket)?, port, dial, connections))
                }
            };
            self.listening.insert(place, ListeningTask(serving));
        }
        Ok(())
    }
}

enum BoundSocket {
    Tcp(StdTcpListener),
    Udp(StdUdpSocket),
}

impl BoundSocket {
    fn bind(place: Place) -> io::Result<Self> {
        let address = place.socket_address();
        if place.port.udp {
            let socket = StdUdpSocket::bind(address)?;
            return socket.set_nonblocking(true).map(|()| Self::Udp(socket));
        }
        let listener = StdTcpListener::bind(address)?;
        listener.set_nonblocking(true).map(|()| Self::Tcp(listener))
    }
}

impl Place {
    fn socket_address(self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.port)
    }
}

fn bind_all(places: Vec<Place>) -> Vec<(Place, BoundSocket)> {
    let bind = |place: Place| {
        let address = place.socket_address();
        let bound = BoundSocket::bind(place).map(|socket| (place, socket));
        // Another process has the port, or the namespace lacks the address.
        bound.inspect_err(|error| tracing::debug!("{address} does not lead into the container: {error}")).ok()
    };
    places.into_iter().filter_map(bind).collect()
}

async fn accept(listener: TcpListener, port: LocalPort, dial: Dial, connections: Arc<Semaphore>) {
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            // The port is tried again with the next report.
            Err(error) => {
                tracing::warn!(
                    "no more connections to port {} of localhost are accepted: {error}",
                    port.port
                );
                return;
            }
        };
        let permit = Arc::clone(&connections).acquire_owned().await.expect("never closed");
        let dial = Arc::clone(&dial);
        tokio::spawn(async move {
            connect(socket, port, &dial).await;
            drop(permit);
        });
    }
}

async fn connect(mut socket: TcpStream, port: LocalPort, dial: &Dial) {
    let relayed = match dial(port).await {
        Ok(stream) => {
            let (from, to) = socket.split();
            relay(from, to, stream).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = relayed {
        tracing::debug!("a connection to port {} of localhost is reset: {error}", port.port);
        drop(socket.set_zero_linger());
    }
}

/// Relays between the two directions of a connection and a stream of frames until both directions have ended, or one has
/// failed.
pub(crate) async fn relay(
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    stream: BoxedStream,
) -> io::Result<()> {
    let (mut reader, mut writer) = split(stream);
    tokio::try_join!(send_frames(from, &mut writer), take_frames(&mut reader, to))?;
    // The guest closes the stream when it knows by this frame that everything has arrived. If it does not, the
    // connection has ended nevertheless.
    let closed = async {
        writer.write_all(&0_u16.to_be_bytes()).await?;
        writer.flush().await?;
        reader.read_u8().await
    };
    drop(timeout(CLOSED_WITHIN, closed).await);
    Ok(())
}

/// Sends what arrives in frames, until it ends.
async fn send_frames(mut from: impl AsyncRead + Unpin, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut frame = vec![0; 2 + MAX_FRAME];
    loop {
        let read = from.read(&mut frame[2..]).await?;
        frame[..2].copy_from_slice(&u16::try_from(read).map_err(io::Error::other)?.to_be_bytes());
        to.write_all(&frame[..2 + read]).await?;
        to.flush().await?;
        if read == 0 {
            return Ok(());
        }
    }
}

/// Writes the content of frames, until an empty one arrives.
async fn take_frames(from: &mut (impl AsyncRead + Unpin), mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let length = usize::from(from.read_u16().await?);
        if length == 0 {
            return to.shutdown().await;
        }
        let frame = frame.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        from.read_exact(frame).await?;
        to.write_all(frame).await?;
    }
}

#[cfg(test)]
mod tests {
    use machinen_protocol::localhost::encode_report;
    use tokio::{
        io::{DuplexStream, duplex},
        sync::mpsc,
    };

    use super::*;

    /// A guest that the test plays, in the namespace of this process.
    struct Guest {
        reports: DuplexStream,
        dialed: mpsc::UnboundedReceiver<(LocalPort, DuplexStream)>,
        served: JoinHandle<io::Error>,
    }

    impl Guest {
        fn new(refuses: bool) -> Self {
            Self::with_addresses(refuses, Vec::new())
        }

        fn with_addresses(refuses: bool, own: Vec<IpAddr>) -> Self {
            let namespace = Arc::new(netns::open("/proc/self/ns/net".as_ref()).unwrap());
            let (reports, theirs) = duplex(1 << 16);
            let (send, dialed) = mpsc::unbounded_channel();
            let dial = move |port| -> DialFuture {
                let (ours, theirs) = duplex(1 << 16);
                drop(send.send((port, ours)));
                Box::pin(async move {
                    let stream: BoxedStream = Box::new(theirs);
                    if refuses { Err(io::ErrorKind::ConnectionRefused.into()) } else { Ok(stream) }
                })
            };
            let own: OwnAddresses = Arc::new(move || {
                let own = own.clone();
                Box::pin(async { own })
            });
            let served = tokio::spawn(serve(Box::new(theirs), namespace, own, Arc::new(dial)));
            Self { reports, dialed, served }
        }

        /// Reports the ports, and returns when the host has followed.
        async fn listens(&mut self, ports: &[LocalPort], reached: LocalPort) {
            self.reports.write_all(&encode_report(&ports.iter().copied().collect())).await.unwrap();
            let wanted = ports.contains(&reached);
            while TcpStream::connect((reached.address(), reached.port)).await.is_ok() != wanted {
                tokio::task::yield_now().await;
            }
            if wanted {
                // That of the loop.
                self.dialed.recv().await.unwrap();
            }
        }
    }

    /// A port on which nothing listens.
    fn free(ipv6: bool) -> LocalPort {
        let any = LocalPort { udp: false, ipv6, port: 0 };
        let port = StdTcpListener::bind((any.address(), 0)).unwrap().local_addr().unwrap().port();
        LocalPort { udp: false, ipv6, port }
    }

    async fn dialed(port: LocalPort) -> TcpStream {
        TcpStream::connect((port.address(), port.port)).await.unwrap()
    }

    #[tokio::test]
    async fn both_directions_end_by_themselves() {
        for ipv6 in [false, true] {
            let (port, mut guest) = (free(ipv6), Guest::new(false));
            guest.listens(&[port], port).await;
            let mut client = dialed(port).await;
            client.write_all(b"query").await.unwrap();
            client.shutdown().await.unwrap();
            let (asked, mut stream) = guest.dialed.recv().await.unwrap();
            assert_eq!(asked, port);
            let mut frames = [0; 9];
            stream.read_exact(&mut frames).await.unwrap();
            assert_eq!(&frames, b"\0\x05query\0\0");
            stream.write_all(b"\0\x06answer\0\0").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "answer");
            // The guest closes the stream only after this.
            assert_eq!(stream.read_u16().await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn only_ports_of_the_last_report_are_taken() {
        let (first, second, mut guest) = (free(false), free(false), Guest::new(false));
        guest.listens(&[first, second], first).await;
        guest.listens(&[second], first).await;
        drop(dialed(second).await);
        guest.served.abort();
        assert!(guest.served.await.unwrap_err().is_cancelled());
        while TcpStream::connect((second.address(), second.port)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_addresses_of_the_guest_lead_to_it_too() {
        let own = [IpAddr::from([127, 0, 0, 7]), IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1])];
        let (port, mut guest) = (free(false), Guest::with_addresses(false, own.to_vec()));
        guest.listens(&[port], port).await;
        let client = TcpStream::connect((own[0], port.port)).await.unwrap();
        assert_eq!(guest.dialed.recv().await.unwrap().0, port);
        drop(client);
        guest.listens(&[], port).await;
        while TcpStream::connect((own[0], port.port)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn addresses_have_the_kind_of_their_port_and_are_few() {
        let port = |ipv6| LocalPort { udp: true, ipv6, port: 7 };
        let many: Vec<_> = (0..20).map(|last| IpAddr::from([10, 0, 0, last])).collect();
        let both = BTreeSet::from([port(false), port(true)]);
        let places = places(&both, &many);
        assert_eq!(places.iter().filter(|place| place.port.ipv6).count(), 1);
        assert_eq!(places.len(), MAX_ADDRESSES + 2);
    }

    #[tokio::test]
    async fn more_ports_than_connections() {
        let ports: BTreeSet<_> = (0..=MAX_CONNECTIONS).map(|_| free(false)).collect();
        let (ports, mut guest) = (Vec::from_iter(ports), Guest::new(false));
        for reached in [ports[0], ports[ports.len() - 1]] {
            guest.listens(&ports, reached).await;
        }
    }

    #[tokio::test]
    async fn the_port_of_another_process_stays_its_own() {
        let (free, mut guest) = (free(false), Guest::new(false));
        let other = StdTcpListener::bind("127.0.0.1:0").unwrap();
        let taken = LocalPort { udp: false, ipv6: false, port: other.local_addr().unwrap().port() };
        guest.listens(&[taken, free], free).await;
        let client = dialed(taken).await;
        assert_eq!(other.accept().unwrap().1, client.local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_connection_that_the_guest_does_not_take_is_reset() {
        let (port, mut guest) = (free(false), Guest::new(true));
        guest.listens(&[port], port).await;
        let mut client = dialed(port).await;
        assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // The same if the stream ends in the middle.
        let (port, mut guest) = (free(false), Guest::new(false));
        guest.listens(&[port], port).await;
        let mut client = dialed(port).await;
        let (_, mut stream) = guest.dialed.recv().await.unwrap();
        stream.write_all(b"\0\x05hal").await.unwrap();
        drop(stream);
        assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // And if a frame is longer than any may be.
        let mut client = dialed(port).await;
        let (_, mut stream) = guest.dialed.recv().await.unwrap();
        stream.write_all(&[0xff; 16]).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_report_that_is_not_valid_ends_it() {
        for report in [&[0xff, 0xff][..], &[0, 1, 9, 0, 80], &[0, 1, 4, 0, 0]] {
            let mut guest = Guest::new(false);
            guest.reports.write_all(report).await.unwrap();
            let error = guest.served.await.unwrap();
            assert_eq!(error.kind(), io::ErrorKind::Other, "{error}");
        }
    }
}
