//! The connections to a server, counted until the other side closes them.
//!
//! A client of ttrpc that sees the end of a connection together with an answer may report either (Go's `select` takes one
//! of them at random), and containerd takes a lost answer to ShutdownSandbox for a failure. So the server leaves it to
//! containerd to close the connection.
//!
//! A containerd whose own client goes away may forget a server that it has started, and remove its bundle before `delete`
//! can find it there. Such a server ends by itself.

use std::{
    io,
    os::unix::net::UnixListener,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use futures_util::stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::watch,
    time::timeout,
};

/// How many connections the other side has not closed.
#[derive(Debug, Clone)]
pub(crate) struct Connections(Arc<watch::Sender<usize>>);

impl Connections {
    /// The connections that `listener` accepts from now on.
    ///
    /// # Errors
    /// The socket cannot be used by the event loop.
    pub(crate) fn of(listener: UnixListener) -> io::Result<(Listener, Self)> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let connections = Self(Arc::new(watch::Sender::new(0)));
        let counted = stream::unfold((listener, connections.clone()), |(listener, connections)| async {
            let accepted = listener.accept().await.map(|(stream, _)| connections.count(stream));
            Some((accepted, (listener, connections)))
        });
        Ok((Listener::new(counted), connections))
    }

    fn count(&self, stream: UnixStream) -> CountedStream {
        self.0.send_modify(|open| *open += 1);
        CountedStream { stream, open: Some(self.clone()) }
    }

    /// Resolves when the other side has closed all connections.
    pub(crate) async fn closed(&self) {
        // The sender is held by this value.
        let _ = self.0.subscribe().wait_for(|open| *open == 0).await;
    }

    /// Resolves when there was no connection for some time, and nobody can need the server any more.
    pub(crate) async fn abandoned(&self, time: Duration, is_useless: impl Fn() -> bool) {
        let mut open = self.0.subscribe();
        loop {
            // The sender is held by this value.
            let _ = open.wait_for(|open| *open == 0).await;
            if timeout(time, open.wait_for(|open| *open > 0)).await.is_err() && is_useless() {
                return;
            }
        }
    }
}

/// A connection; `open` is None after its end.
#[derive(Debug)]
struct CountedStream {
    stream: UnixStream,
    open: Option<Connections>,
}

impl CountedStream {
    fn ended(&mut self) {
        if let Some(Connections(open)) = self.open.take() {
            open.send_modify(|open| *open -= 1);
        }
    }
}

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.ended();
    }
}

impl AsyncRead for CountedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.remaining();
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        if read.is_err() || (before > 0 && buffer.remaining() == before) {
            self.ended();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for CountedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_connection_counts_until_the_other_side_closes_it() {
        let connections = Connections(Arc::new(watch::Sender::new(0)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut counted = connections.count(ours);
        assert!(connections.closed().now_or_never().is_none());
        drop(theirs);
        counted.read_to_end(&mut Vec::new()).await.unwrap();
        timeout(Duration::from_secs(10), connections.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn a_server_without_connections_is_abandoned_if_it_has_nothing_to_serve() {
        const SOON: Duration = Duration::from_millis(20);
        let connections = Connections(Arc::new(watch::Sender::new(0)));
        let abandoned =
            |is_useless: bool| timeout(SOON * 10, connections.abandoned(SOON, move || is_useless));
        abandoned(true).await.expect("nothing has connected");
        abandoned(false).await.expect_err("there is something to serve");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut counted = connections.count(ours);
        abandoned(true).await.expect_err("there is a connection");
        drop(theirs);
        counted.read_to_end(&mut Vec::new()).await.unwrap();
        abandoned(true).await.expect("the connection is closed");
    }
}
