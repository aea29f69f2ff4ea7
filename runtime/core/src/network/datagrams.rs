//! Datagrams (UDP) to the localhost of a pod's network namespace lead to the guest's localhost.
//!
//! Each sender has a stream of its own, as long as it sends or gets answers, so that the answers find it. As everywhere with
//! UDP, datagrams may be lost: those for which there is no stream, and those that arrive faster than the guest takes them.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use machinen_protocol::localhost::{LocalPort, MAX_DATAGRAM};
use machinen_vm::BoxedStream;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, split},
    net::UdpSocket,
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::localhost::Dial;

/// How long a stream is kept for the next datagram.
const IDLE: Duration = Duration::from_secs(60);
/// Most datagrams of a sender that wait.
const WAITING: usize = 16;

/// Takes datagrams until this is dropped, or the socket fails. `connections` is what the pod shares.
pub(super) async fn serve(socket: UdpSocket, port: LocalPort, dial: Dial, connections: Arc<Semaphore>) {
    let socket = Arc::new(socket);
    let mut senders: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut flows = JoinSet::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // A sender has not waited for its answer.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => {
                tracing::warn!("no more datagrams to port {} of localhost are taken: {error}", port.port);
                return;
            }
        };
        while flows.try_join_next().is_some() {}
        senders.retain(|_, waiting| !waiting.is_closed());
        if length == 0 {
            continue;
        }
        let waiting = match senders.entry(from) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else { continue };
                let (waiting, datagrams) = mpsc::channel(WAITING);
                let (socket, dial) = (Arc::clone(&socket), Arc::clone(&dial));
                flows.spawn(async move {
                    if let Err(error) = relay(&socket, from, datagrams, port, &dial).await {
                        tracing::debug!("datagrams to port {} of localhost are lost: {error}", port.port);
                    }
                    drop(permit);
                });
                new.insert(waiting)
            }
        };
        // A full queue loses the datagram.
        drop(waiting.try_send(buffer[..length].to_vec()));
    }
}

/// Relays the datagrams of one sender, and the answers to it, until neither has come for a while.
async fn relay(
    socket: &UdpSocket,
    from: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    port: LocalPort,
    dial: &Dial,
) -> io::Result<()> {
    let stream: BoxedStream = dial(port).await?;
    let (mut reader, mut writer) = split(stream);
    let last = Mutex::new(Instant::now());
    let seen = || *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    let queries = async {
        while let Some(datagram) = datagrams.recv().await {
            seen();
            writer.write_u16(u16::try_from(datagram.len()).map_err(io::Error::other)?).await?;
            writer.write_all(&datagram).await?;
            writer.flush().await?;
        }
        Ok::<_, io::Error>(())
    };
    let answers = async {
        let mut frame = vec![0; MAX_DATAGRAM];
        loop {
            let length = usize::from(reader.read_u16().await?);
            let frame = frame.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
            reader.read_exact(frame).await?;
            seen();
            socket.send_to(frame, from).await?;
        }
    };
    let idle = async {
        loop {
            let end = *last.lock().unwrap_or_else(PoisonError::into_inner) + IDLE;
            if end <= Instant::now() {
                return;
            }
            sleep_until(end).await;
        }
    };
    tokio::select! {
        ended = queries => ended,
        ended = answers => ended,
        () = idle => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{DuplexStream, duplex},
        time::{pause, timeout},
    };

    use super::*;

    /// The port, and the streams of a guest that the test plays.
    async fn served() -> (SocketAddr, mpsc::UnboundedReceiver<DuplexStream>, Arc<Semaphore>) {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        let (send, dialed) = mpsc::unbounded_channel();
        let dial: Dial = Arc::new(move |_| {
            let (ours, theirs) = duplex(1 << 20);
            drop(send.send(ours));
            Box::pin(async move { Ok(Box::new(theirs) as BoxedStream) })
        });
        let connections = Arc::new(Semaphore::new(2));
        let port = LocalPort { udp: true, ipv6: false, port: address.port() };
        tokio::spawn(serve(socket, port, dial, Arc::clone(&connections)));
        (address, dialed, connections)
    }

    async fn sender(to: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        socket.connect(to).await.unwrap();
        socket
    }

    #[tokio::test]
    async fn each_sender_gets_its_own_answers() {
        let (address, mut dialed, _) = served().await;
        let (one, two) = (sender(address).await, sender(address).await);
        one.send(b"one").await.unwrap();
        let mut first = dialed.recv().await.unwrap();
        two.send(b"two").await.unwrap();
        let mut second = dialed.recv().await.unwrap();
        one.send(&[7; MAX_DATAGRAM]).await.unwrap();
        let mut frame = [0; 5];
        second.read_exact(&mut frame).await.unwrap();
        assert_eq!(&frame, b"\0\x03two");
        second.write_all(b"\0\x03TWO").await.unwrap();
        first.read_exact(&mut frame).await.unwrap();
        assert_eq!(&frame, b"\0\x03one");
        let mut large = vec![0; MAX_DATAGRAM];
        assert_eq!(usize::from(first.read_u16().await.unwrap()), MAX_DATAGRAM);
        first.read_exact(&mut large).await.unwrap();
        first.write_all(b"\0\x03ONE").await.unwrap();
        let mut answer = [0; 9];
        assert_eq!(one.recv(&mut answer).await.unwrap(), 3);
        assert_eq!(&answer[..3], b"ONE");
        assert_eq!(two.recv(&mut answer).await.unwrap(), 3);
        assert_eq!(&answer[..3], b"TWO");
    }

    #[tokio::test]
    async fn streams_are_bounded_and_end() {
        let (address, mut dialed, connections) = served().await;
        let (one, two, three) = (sender(address).await, sender(address).await, sender(address).await);
        one.send(b"1").await.unwrap();
        let first = dialed.recv().await.unwrap();
        two.send(b"2").await.unwrap();
        let _second = dialed.recv().await.unwrap();
        // There is no third stream until one of the two has ended.
        three.send(b"3").await.unwrap();
        assert!(timeout(Duration::from_millis(100), dialed.recv()).await.is_err());
        drop(first);
        while connections.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        three.send(b"3").await.unwrap();
        let _third = dialed.recv().await.unwrap();
        pause();
        tokio::time::advance(IDLE * 2).await;
        while connections.available_permits() < 2 {
            tokio::task::yield_now().await;
        }
    }
}
