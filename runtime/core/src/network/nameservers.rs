//! Nameservers that only the pod's network namespace has, such as Docker's at 127.0.0.11.
//!
//! A container sends to them in its VM, where nothing listens at that address. The agent sends the queries here, and
//! here they are sent in the namespace. Which nameservers these are is in the container's /etc/resolv.conf, a file of
//! the host that is mounted in the container. The guest chooses the content of a query, and never where it is sent.

use std::{
    fs::File,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddr, TcpStream as StdTcpStream, UdpSocket as StdUdpSocket},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Arc,
};

use machinen_base::netns;
use machinen_protocol::nameservers::{
    ANSWERED_WITHIN, MAX_NAMESERVERS, MAX_OPEN, PORT, QueryHeader, ReplyHeader, Transport,
};
use machinen_vm::BoxedStream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    net::{TcpStream, UdpSocket},
    sync::{Semaphore, mpsc},
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

/// Most bytes of a resolv.conf that are read.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// A container's /etc/resolv.conf: the file of the host, which is not replaced by another one under the same path.
pub(super) type ResolvConf = Arc<OwnedFd>;

/// The nameservers of the loopback network that the files name. A file that cannot be read names none.
pub(super) fn named_in(files: &[ResolvConf]) -> Vec<Ipv4Addr> {
    let mut found: Vec<_> = files
        .iter()
        .filter_map(|file| {
            read(file)
                .inspect_err(|error| tracing::warn!("cannot read a container's resolv.conf: {error}"))
                .ok()
        })
        .flat_map(|text| parse(&text))
        .collect();
    found.sort_unstable();
    found.dedup();
    found.truncate(MAX_NAMESERVERS);
    found
}

fn read(file: &OwnedFd) -> io::Result<String> {
    let opened = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let mut text = Vec::new();
    opened.take(MAX_RESOLV_CONF).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The addresses of the lines `nameserver ADDRESS` (resolv.conf(5)) that are of the loopback network.
fn parse(text: &str) -> Vec<Ipv4Addr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        words.next().filter(|&word| word == "nameserver")?;
        words.next()?.parse().ok().filter(Ipv4Addr::is_loopback)
    };
    text.lines().filter_map(address).collect()
}

/// Answers the queries that arrive on the stream, until it ends.
pub(super) async fn answer(stream: BoxedStream, namespace: Arc<OwnedFd>, nameservers: Vec<Ipv4Addr>) {
    let (reader, writer) = split(stream);
    let (send, replies) = mpsc::channel(MAX_OPEN);
    let mut tasks = JoinSet::new();
    tasks.spawn(take_queries(reader, namespace, nameservers, send));
    tasks.spawn(send_replies(writer, replies));
    if let Some(Ok(Err(error))) = tasks.join_next().await {
        tracing::debug!("the stream for nameservers has ended: {error}");
    }
}

async fn send_replies(
    mut stream: WriteHalf<BoxedStream>,
    mut replies: mpsc::Receiver<Vec<u8>>,
) -> io::Result<()> {
    while let Some(reply) = replies.recv().await {
        stream.write_all(&reply).await?;
        stream.flush().await?;
    }
    Ok(())
}

async fn take_queries(
    mut stream: ReadHalf<BoxedStream>,
    namespace: Arc<OwnedFd>,
    nameservers: Vec<Ipv4Addr>,
    replies: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    loop {
        let mut header = [0; QueryHeader::SIZE];
        stream.read_exact(&mut header).await?;
        let header = QueryHeader::decode(header).map_err(io::Error::other)?;
        let nameserver = nameservers.get(usize::from(header.nameserver)).copied();
        let nameserver =
            nameserver.ok_or_else(|| io::Error::other("a query is for an unknown nameserver"))?;
        let mut query = vec![0; header.length.into()];
        stream.read_exact(&mut query).await?;
        // A guest that sends more than it should waits.
        let permit = Arc::clone(&open).acquire_owned().await.map_err(io::Error::other)?;
        let (namespace, replies) = (Arc::clone(&namespace), replies.clone());
        tokio::spawn(async move {
            let asked = timeout(ANSWERED_WITHIN, ask(namespace, nameserver, header.transport, query)).await;
            let reply =
                asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).unwrap_or_else(|error| {
                    tracing::debug!("the nameserver {nameserver} does not answer: {error}");
                    Vec::new()
                });
            let length = u16::try_from(reply.len()).expect("both transports have shorter messages");
            let header = ReplyHeader { id: header.id, length };
            // Without a stream nothing waits for the reply.
            drop(replies.send([&header.encode(), &*reply].concat()).await);
            drop(permit);
        });
    }
}

/// Sends a query to a nameserver of the namespace, and returns the reply.
async fn ask(
    namespace: Arc<OwnedFd>,
    nameserver: Ipv4Addr,
    transport: Transport,
    query: Vec<u8>,
) -> io::Result<Vec<u8>> {
    let address = SocketAddr::from((nameserver, PORT));
    match transport {
        Transport::Udp => {
            let socket = in_namespace(namespace, move || {
                let socket = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect(address)?;
                socket.set_nonblocking(true).map(|()| socket)
            });
            let socket = UdpSocket::from_std(socket.await?)?;
            socket.send(&query).await?;
            let mut reply = vec![0; usize::from(u16::MAX)];
            let length = socket.recv(&mut reply).await?;
            reply.truncate(length);
            Ok(reply)
        }
        Transport::Tcp => {
            let socket = in_namespace(namespace, move || {
                let socket = StdTcpStream::connect_timeout(&address, ANSWERED_WITHIN)?;
                socket.set_nonblocking(true).map(|()| socket)
            });
            let mut socket = TcpStream::from_std(socket.await?)?;
            let length = u16::try_from(query.len()).map_err(io::Error::other)?;
            socket.write_all(&[&length.to_be_bytes(), &*query].concat()).await?;
            let mut reply = vec![0; socket.read_u16().await?.into()];
            socket.read_exact(&mut reply).await?;
            Ok(reply)
        }
    }
}

async fn in_namespace<T: Send + 'static>(
    namespace: Arc<OwnedFd>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(move || netns::inside(namespace.as_fd(), work))
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, time::Duration};

    use tokio::io::duplex;

    use super::*;

    #[test]
    fn only_nameservers_of_the_loopback_network_count() {
        let text = "# nameserver 127.0.0.1\nsearch a b\nnameserver 127.0.0.11\n nameserver\t127.0.0.53 x\n\
                    nameserver 10.0.0.1\nnameserver ::1\nnameserver\noptions ndots:0\nnameserver 127.0.0.11";
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let file: ResolvConf = Arc::new(file.into());
        let wanted = [Ipv4Addr::new(127, 0, 0, 11), Ipv4Addr::new(127, 0, 0, 53)];
        assert_eq!(named_in(&[Arc::clone(&file), file]), wanted);
    }

    /// Takes what comes first: the end of the stream, or a reply.
    async fn reply_to(message: &[u8], nameservers: &[Ipv4Addr]) -> Option<(ReplyHeader, Vec<u8>)> {
        let namespace = Arc::new(netns::open("/proc/self/ns/net".as_ref()).unwrap());
        let (mut ours, theirs) = duplex(1 << 17);
        tokio::spawn(answer(Box::new(theirs), namespace, nameservers.to_vec()));
        ours.write_all(message).await.unwrap();
        let read = async {
            let mut header = [0; ReplyHeader::SIZE];
            ours.read_exact(&mut header).await.ok()?;
            let header = ReplyHeader::decode(header);
            let mut reply = vec![0; header.length.into()];
            ours.read_exact(&mut reply).await.ok()?;
            Some((header, reply))
        };
        timeout(Duration::from_secs(60), read).await.expect("something comes")
    }

    #[tokio::test]
    async fn a_guest_cannot_choose_where_a_query_is_sent() {
        let header = QueryHeader { id: 1, nameserver: 1, transport: Transport::Udp, length: 0 };
        assert_eq!(reply_to(&header.encode(), &[Ipv4Addr::LOCALHOST]).await, None);
        assert_eq!(reply_to(&[0xff; QueryHeader::SIZE], &[Ipv4Addr::LOCALHOST]).await, None);
    }

    #[tokio::test]
    async fn a_nameserver_that_does_not_exist_gives_an_empty_reply() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let header = QueryHeader { id: 7, nameserver: 0, transport, length: 2 };
            let message = [&header.encode()[..], b"ab"].concat();
            // No machine has a nameserver at this address.
            let reply = reply_to(&message, &[Ipv4Addr::new(127, 200, 0, 1)]).await;
            assert_eq!(reply, Some((ReplyHeader { id: 7, length: 0 }, Vec::new())), "{transport:?}");
        }
    }
}
