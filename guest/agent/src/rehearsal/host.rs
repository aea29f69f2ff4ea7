//! The host's end of a channel, which a template's agent has inside of the guest while it rehearses.

use std::{future::poll_fn, io, os::unix::net::UnixStream as StdUnixStream, task::Poll};

use machinen_protocol::preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble, PreambleError, StreamKind};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::boot::ChannelSource;

/// A stream to the agent.
pub(super) type HostStream = Compat<yamux::Stream>;

type Dialled = oneshot::Sender<yamux::Stream>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error("cannot make the two ends of a channel")]
    Make(#[source] io::Error),
    #[error("the channel has ended")]
    Closed,
    #[error("cannot greet the agent")]
    Greet(#[source] io::Error),
    #[error("the agent's greeting is invalid")]
    Preamble(#[from] PreambleError),
    #[error("the agent has refused a stream")]
    Refused,
}

/// The channel ends when this is dropped.
#[derive(Debug)]
pub(super) struct Host {
    control: oneshot::Receiver<yamux::Stream>,
    dial: mpsc::Sender<Dialled>,
    last_token: u64,
}

impl Host {
    /// Makes a channel. Returns its end for the agent, too.
    pub(super) fn new() -> Result<(Self, ChannelSource), HostError> {
        let (ours, agents) = StdUnixStream::pair().map_err(HostError::Make)?;
        ours.set_nonblocking(true).map_err(HostError::Make)?;
        let ours = UnixStream::from_std(ours).map_err(HostError::Make)?;
        let (control_sender, control) = oneshot::channel();
        let (dial, dials) = mpsc::channel(1);
        let connection = Connection::new(ours.compat(), Config::default(), Mode::Client);
        tokio::spawn(drive(connection, control_sender, dials));
        Ok((Self { control, dial, last_token: 0 }, ChannelSource::Stream(agents.into())))
    }

    /// The control stream, which the agent dials.
    pub(super) async fn accept(&mut self) -> Result<HostStream, HostError> {
        let mut stream = (&mut self.control).await.map_err(|_| HostError::Closed)?.compat();
        let mut bytes = [0; PREAMBLE_LEN];
        stream.read_exact(&mut bytes).await.map_err(HostError::Greet)?;
        if Preamble::decode(&bytes)?.kind != StreamKind::Control {
            return Err(HostError::Refused);
        }
        let answered = async {
            stream.write_all(&Answer::Accepted.encode()).await?;
            stream.flush().await
        };
        answered.await.map_err(HostError::Greet)?;
        Ok(stream)
    }

    /// Opens a raw stream, and returns its token.
    pub(super) async fn open(&mut self) -> Result<(u64, HostStream), HostError> {
        let (reply, dialled) = oneshot::channel();
        self.dial.send(reply).await.map_err(|_| HostError::Closed)?;
        let mut stream = dialled.await.map_err(|_| HostError::Closed)?.compat();
        self.last_token += 1;
        let mut answer = [0; ANSWER_LEN];
        let greeted = async {
            stream.write_all(&Preamble { kind: StreamKind::Raw, token: self.last_token }.encode()).await?;
            stream.flush().await?;
            stream.read_exact(&mut answer).await
        };
        greeted.await.map_err(HostError::Greet)?;
        match Answer::decode(&answer)? {
            Answer::Accepted => Ok((self.last_token, stream)),
            Answer::WrongVersion | Answer::Refused => Err(HostError::Refused),
        }
    }
}

enum HostEvent {
    /// None: the host has gone.
    Dial(Option<Dialled>),
    /// None: the agent has gone.
    Inbound(Option<yamux::Stream>),
}

async fn drive(
    mut connection: Connection<Compat<UnixStream>>,
    control: oneshot::Sender<yamux::Stream>,
    mut dials: mpsc::Receiver<Dialled>,
) {
    let mut control = Some(control);
    loop {
        let event = poll_fn(|cx| match dials.poll_recv(cx) {
            Poll::Ready(dial) => Poll::Ready(HostEvent::Dial(dial)),
            Poll::Pending => {
                let inbound = connection.poll_next_inbound(cx);
                inbound.map(|stream| HostEvent::Inbound(stream.and_then(Result::ok)))
            }
        });
        match event.await {
            HostEvent::Dial(Some(reply)) => {
                let Ok(stream) = poll_fn(|cx| connection.poll_new_outbound(cx)).await else { return };
                // A failure means that the caller does not wait any more.
                let _ = reply.send(stream);
            }
            HostEvent::Inbound(Some(stream)) => {
                if let Some(control) = control.take() {
                    let _ = control.send(stream);
                }
            }
            HostEvent::Dial(None) => {
                // The agent sees the end of the socket in any case.
                let _ = poll_fn(|cx| connection.poll_close(cx)).await;
                return;
            }
            HostEvent::Inbound(None) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::{Channel, Unclaimed, Unopened};

    #[tokio::test]
    async fn an_agent_finds_a_host() {
        let (mut host, source) = Host::new().unwrap();
        let unclaimed = Unclaimed::default();
        let channel = Channel::open(Unopened::open(source).await.unwrap(), &unclaimed, None);
        let (accepted, dialled) = tokio::join!(host.accept(), channel.dial_control());
        let (mut accepted, (mut control, _watch)) = (accepted.unwrap(), dialled.unwrap());
        control.write_all(b"hello").await.unwrap();
        control.flush().await.unwrap();
        let mut read = [0; 5];
        accepted.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");

        let (token, mut raw) = host.open().await.unwrap();
        let mut claimed = unclaimed.claim(token).await.unwrap();
        raw.write_all(b"bytes").await.unwrap();
        raw.flush().await.unwrap();
        claimed.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"bytes");

        drop(host);
        assert_eq!(control.read(&mut read).await.unwrap_or(0), 0, "the channel stays open");
    }
}
