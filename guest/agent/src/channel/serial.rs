//! yamux over one byte stream. One task owns the connection; all others send it requests.

use std::{
    future::poll_fn,
    task::{Context, Poll},
};

use tokio::{
    io::BufStream,
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, ConnectionError, Mode};

use super::{ChannelError, Stream, Unclaimed, port::Port, preamble};
use crate::console;

/// The virtio driver takes at most this much in one write, and each write spins until the host has taken the
/// bytes.
const PORT_WRITE: usize = 32 << 10;
/// Length of a yamux frame's header (yamux specification).
const FRAME_HEADER: usize = 12;
const READ_BUFFER: usize = 64 << 10;

type Dialled = oneshot::Sender<Result<yamux::Stream, ConnectionError>>;
type Conn = Connection<tokio_util::compat::Compat<BufStream<Port>>>;

#[derive(Debug)]
enum SerialRequest {
    Dial(Dialled),
    /// Dropping the sender is the answer that everything was written.
    Close(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(crate) struct Serial {
    requests: mpsc::Sender<SerialRequest>,
}

impl Serial {
    pub(super) fn over(port: Port, unclaimed: Unclaimed) -> Self {
        let mut config = Config::default();
        // A frame and its header fill one write.
        config.set_split_send_size(PORT_WRITE - FRAME_HEADER);
        let stream = BufStream::with_capacity(READ_BUFFER, PORT_WRITE, port);
        let connection = Connection::new(stream.compat(), config, Mode::Server);
        let (requests, inbox) = mpsc::channel(1);
        tokio::spawn(drive(connection, inbox, unclaimed));
        Self { requests }
    }

    pub(super) async fn dial(&self) -> Result<Stream, ChannelError> {
        let (reply, dialled) = oneshot::channel();
        let gone = |_| ChannelError::SerialClosed;
        self.requests.send(SerialRequest::Dial(reply)).await.map_err(|_| ChannelError::SerialClosed)?;
        let stream = dialled.await.map_err(gone)?.map_err(ChannelError::Serial)?;
        Ok(Stream::Serial(stream.compat()))
    }

    /// Writes everything that is pending, then ends the connection.
    pub(super) async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.requests.send(SerialRequest::Close(reply)).await.is_ok() {
            // An error is the answer: the sender was dropped.
            let _ = closed.await;
        }
    }
}

enum SerialEvent {
    Inbound(yamux::Stream),
    Request(SerialRequest),
    Ended(Option<ConnectionError>),
}

async fn drive(mut connection: Conn, mut requests: mpsc::Receiver<SerialRequest>, unclaimed: Unclaimed) {
    loop {
        match poll_fn(|cx| next(&mut connection, &mut requests, cx)).await {
            SerialEvent::Inbound(stream) => {
                tokio::spawn(preamble::welcome(Stream::Serial(stream.compat()), unclaimed.clone()));
            }
            SerialEvent::Request(SerialRequest::Dial(reply)) => {
                // A failure means that the caller does not wait any more.
                let _ = reply.send(poll_fn(|cx| connection.poll_new_outbound(cx)).await);
            }
            SerialEvent::Request(SerialRequest::Close(done)) => {
                if let Err(err) = poll_fn(|cx| connection.poll_close(cx)).await {
                    console::say(&format!("cannot close the serial channel: {err}"));
                }
                drop(done);
                return;
            }
            SerialEvent::Ended(err) => {
                if let Some(err) = err {
                    console::say(&format!("the serial channel has failed: {err}"));
                }
                return;
            }
        }
    }
}

fn next(
    connection: &mut Conn,
    requests: &mut mpsc::Receiver<SerialRequest>,
    cx: &mut Context<'_>,
) -> Poll<SerialEvent> {
    if let Poll::Ready(Some(request)) = requests.poll_recv(cx) {
        return Poll::Ready(SerialEvent::Request(request));
    }
    connection.poll_next_inbound(cx).map(|inbound| match inbound {
        Some(Ok(stream)) => SerialEvent::Inbound(stream),
        Some(Err(err)) => SerialEvent::Ended(Some(err)),
        None => SerialEvent::Ended(None),
    })
}
