//! A channel that carries all streams as yamux over one virtio serial port. What a guest can make the host
//! keep is bounded by the windows of all streams together (`joined.rs`).

use std::{
    collections::VecDeque,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    pin::pin,
    task::Poll,
};

use tokio::{
    net::UnixStream,
    sync::{Mutex, mpsc, oneshot},
};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::{
    BoxedStream, VmChannelError,
    joined::{JoinedSocket, JoinedStream, StreamTable},
};

/// The largest number of streams at once: three for each of a few dozen processes.
const MAX_STREAMS: usize = 256;
/// yamux gives every stream at least this window, bytes.
const MIN_WINDOW: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct SerialChannel {
    control: Mutex<mpsc::Receiver<JoinedStream>>,
    dial: mpsc::Sender<Dial>,
}

type Dial = oneshot::Sender<Result<JoinedStream, yamux::ConnectionError>>;

impl SerialChannel {
    /// Returns the end that QEMU inherits.
    pub(super) fn prepare() -> Result<(Self, OwnedFd), VmChannelError> {
        let failed = |source| VmChannelError::Host { action: "make a socket pair", source };
        let (ours, qemus) = Self::socket_pair()?;
        ours.set_nonblocking(true).map_err(failed)?;
        let ours = UnixStream::from_std(ours).map_err(failed)?;
        Ok((Self::over(ours), qemus))
    }

    /// The two ends, without yamux on the host's: yamux would send something at once, and all clones of a
    /// template would inherit what the template has received.
    pub(super) fn socket_pair() -> Result<(StdUnixStream, OwnedFd), VmChannelError> {
        let failed = |source| VmChannelError::Host { action: "make a socket pair", source };
        let (ours, qemus) = StdUnixStream::pair().map_err(failed)?;
        Ok((ours, qemus.into()))
    }

    pub(super) fn over(socket: UnixStream) -> Self {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_STREAMS * MIN_WINDOW));
        let table = StreamTable::new(MAX_STREAMS * MIN_WINDOW);
        let socket = JoinedSocket::new(socket.compat(), table.clone());
        let connection = yamux::Connection::new(socket, config, yamux::Mode::Client);
        let (control_sender, control) = mpsc::channel(1);
        let (dial, dials) = mpsc::channel(16);
        tokio::spawn(serve(connection, table, control_sender, dials));
        Self { control: Mutex::new(control), dial }
    }

    /// The first stream that the guest opens.
    pub(super) async fn accept(&self) -> Result<BoxedStream, VmChannelError> {
        match self.control.lock().await.recv().await {
            Some(stream) => Ok(Box::new(stream)),
            None => Err(closed()),
        }
    }

    pub(super) async fn dial(&self) -> Result<BoxedStream, VmChannelError> {
        let (answer, answered) = oneshot::channel();
        self.dial.send(answer).await.map_err(|_| closed())?;
        let stream = answered.await.map_err(|_| closed())?;
        let stream = stream.map_err(|error| VmChannelError::Closed(io::Error::other(error)))?;
        Ok(Box::new(stream))
    }
}

fn closed() -> VmChannelError {
    VmChannelError::Closed(io::ErrorKind::ConnectionAborted.into())
}

/// Drives the connection until it ends, or until the dialling handle and all streams are dropped.
async fn serve<S>(
    mut connection: yamux::Connection<S>,
    table: StreamTable,
    control: mpsc::Sender<JoinedStream>,
    mut dials: mpsc::Receiver<Dial>,
) where
    S: futures_io::AsyncRead + futures_io::AsyncWrite + Unpin,
{
    let mut control = Some(control);
    let mut pending: VecDeque<Dial> = VecDeque::new();
    let ended = std::future::poll_fn(|cx| {
        while let Poll::Ready(Some(dial)) = dials.poll_recv(cx) {
            pending.push_back(dial);
        }
        while !pending.is_empty() {
            let Poll::Ready(stream) = connection.poll_new_outbound(cx) else { break };
            if let Some(dial) = pending.pop_front() {
                // A stream whose caller went away is dropped, which resets it.
                dial.send(stream.map(|stream| table.open(stream))).ok();
            }
        }
        loop {
            match connection.poll_next_inbound(cx) {
                // Only the first is the control stream; any other that a guest opens is dropped, which resets
                // it.
                Poll::Ready(Some(Ok(stream))) => {
                    if let Some(control) = control.take() {
                        control.try_send(table.open(stream)).ok();
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(error)),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    if let Some(error) = pin!(ended).await {
        tracing::debug!("serial channel ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::compat::FuturesAsyncReadCompatExt as _;

    use super::*;

    /// A guest: dials one control stream, and echoes what comes on every stream that the host dials.
    fn guest(socket: UnixStream) -> oneshot::Receiver<yamux::Stream> {
        let mut connection =
            yamux::Connection::new(socket.compat(), yamux::Config::default(), yamux::Mode::Server);
        let (sender, receiver) = oneshot::channel();
        tokio::spawn(async move {
            let control = std::future::poll_fn(|cx| connection.poll_new_outbound(cx)).await.unwrap();
            sender.send(control).unwrap();
            while let Some(Ok(stream)) = std::future::poll_fn(|cx| connection.poll_next_inbound(cx)).await {
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream.compat());
                    tokio::io::copy(&mut reader, &mut writer).await.ok();
                });
            }
        });
        receiver
    }

    #[tokio::test]
    async fn both_sides_dial() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serial = SerialChannel::over(ours);
        let mut theirs = guest(theirs).await.unwrap().compat();
        theirs.write_all(b"ready").await.unwrap();
        theirs.flush().await.unwrap();
        let mut ours = serial.accept().await.unwrap();
        let mut text = [0; 5];
        ours.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"ready");

        for number in 0..3_u8 {
            let mut stream = serial.dial().await.unwrap();
            stream.write_all(&[number; 1000]).await.unwrap();
            stream.flush().await.unwrap();
            let mut echoed = [9; 1000];
            stream.read_exact(&mut echoed).await.unwrap();
            assert_eq!(echoed, [number; 1000]);
        }
    }

    #[tokio::test]
    async fn the_end_of_the_vm_is_seen_by_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serial = SerialChannel::over(ours);
        drop(theirs);
        assert!(matches!(serial.accept().await, Err(VmChannelError::Closed(_))));
        assert!(matches!(serial.dial().await, Err(VmChannelError::Closed(_))));
    }

    #[tokio::test]
    async fn noise_instead_of_yamux_ends_the_channel() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let serial = SerialChannel::over(ours);
        theirs.write_all(&[0xff; 4096]).await.unwrap();
        assert!(matches!(serial.accept().await, Err(VmChannelError::Closed(_))));
    }
}
