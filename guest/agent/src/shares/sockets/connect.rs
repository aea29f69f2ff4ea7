//! Connections that containers make to a socket of the host.

use std::{io, os::fd::AsFd as _, sync::Arc, time::Duration};

use machinen_protocol::sockets::{DialHeader, MAX_CONNECTIONS};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, split},
    net::{UnixListener, UnixStream},
    sync::{Mutex, Notify, Semaphore, mpsc},
    time::timeout,
};

use crate::{
    channel::Stream,
    console,
    network::localhost::relay::{ENDED_WITHIN, send_frames, take_frames},
};

/// How long the host may take to open a stream, and to connect.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);
/// Streams that the host may open before they are used.
const OFFERED: usize = 4;

/// The streams that the host has opened for connections, and how many connections there are.
#[derive(Debug)]
pub(super) struct OfferedStreams {
    offer: mpsc::Sender<Stream>,
    offered: Mutex<mpsc::Receiver<Stream>>,
    connections: Arc<Semaphore>,
}

impl Default for OfferedStreams {
    fn default() -> Self {
        let (offer, offered) = mpsc::channel(OFFERED);
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Self { offer, offered: Mutex::new(offered), connections }
    }
}

impl OfferedStreams {
    /// Keeps a stream for a connection.
    pub(super) async fn add(&self, stream: Stream) {
        // The other end is in this structure.
        drop(self.offer.send(stream).await);
    }
}

/// Accepts connections to the socket `node` of the host, until the host has none there any more. A socket that is `kept`
/// may be one on which nothing listens yet.
pub(super) async fn serve(listener: UnixListener, node: u64, kept: bool, offered: Arc<OfferedStreams>) {
    let lost = Arc::new(Notify::new());
    loop {
        let permit = Arc::clone(&offered.connections).acquire_owned().await.expect("never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = lost.notified() => return,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            // The next process that looks the socket up makes another listener.
            Err(error) => {
                return console::say(&format!("connections to a socket of the host end: {error}"));
            }
        };
        let (offered, lost) = (Arc::clone(&offered), Arc::clone(&lost));
        tokio::spawn(async move {
            let refused = connect(socket, node, &offered).await;
            drop(permit);
            if refused && !kept {
                lost.notify_one();
            }
        });
    }
}

/// Relays a connection. True: nothing listens on the host.
async fn connect(socket: UnixStream, node: u64, offered: &OfferedStreams) -> bool {
    match timeout(CONNECTED_WITHIN, dial(&socket, node, offered)).await {
        Ok(Ok(stream)) => {
            relay(socket, stream).await;
            false
        }
        // The process has a connection that ends.
        Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

async fn dial(socket: &UnixStream, node: u64, offered: &OfferedStreams) -> io::Result<Stream> {
    let credentials =
        nix::sys::socket::getsockopt(&socket.as_fd(), nix::sys::socket::sockopt::PeerCredentials)?;
    let header = DialHeader { node, uid: credentials.uid(), gid: credentials.gid() };
    let stream = offered.offered.lock().await.recv().await;
    let mut stream = stream.ok_or(io::ErrorKind::NotConnected)?;
    stream.write_all(&header.encode()).await?;
    stream.flush().await?;
    match stream.read_i32().await? {
        0 => Ok(stream),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Relays until both directions have ended, or one has failed.
async fn relay(mut socket: UnixStream, stream: Stream) {
    let (mut reader, mut writer) = split(stream);
    let (from, to) = socket.split();
    let relayed = tokio::try_join!(send_frames(from, &mut writer), take_frames(&mut reader, to));
    if relayed.is_ok() {
        // The host has everything when it sends one more frame without bytes, and only then the stream may be closed.
        drop(timeout(ENDED_WITHIN, reader.read_u16()).await);
    }
}
