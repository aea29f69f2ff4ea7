//! Streams over AF_VSOCK (vsock(7)).

use std::{io, time::Duration};

use machinen_protocol::{STREAM_PORT, control_port, preamble::Wake};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::{ChannelError, Stream, Unclaimed, preamble};
use crate::console;

/// How long the first call waits for an answer. A host that listens, and that is not busy, answers within a
/// millisecond.
const FIRST_PATIENCE: Duration = Duration::from_millis(250);
/// Each call waits twice as long as the one before, up to this: the answer of a busy host is late.
const LONGEST_PATIENCE: Duration = Duration::from_secs(4);
/// 20 seconds in all, if no call is answered.
const CALLS: usize = 8;

/// Longest write to the host. The kernel spreads a larger packet over several descriptors. vhost-device-vsock
/// 0.3 silently drops such packets: the bytes and the credit for them are lost, and the stream stalls.
pub(super) const MAX_WRITE: usize = 28 << 10;

/// A listener for any CID, so that it survives a change of the VM's CID.
#[derive(Debug)]
pub(crate) struct Listener(VsockListener);

impl Listener {
    pub(super) fn bind() -> Result<Self, ChannelError> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
            .map(Self)
            .map_err(|source| ChannelError::Listen { port: STREAM_PORT, source })
    }

    /// Accepts in the background, for as long as the agent lives.
    pub(super) fn accept_into(self, unclaimed: Unclaimed) {
        tokio::spawn(async move {
            loop {
                match self.0.accept().await {
                    // Containers share the VM's sockets: only the host may open streams.
                    Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                        tokio::spawn(preamble::welcome(Stream::Vsock(stream), unclaimed.clone()));
                    }
                    Ok((_, peer)) => console::say(&format!("refused a stream of CID {}", peer.cid())),
                    Err(err) => console::say(&format!("cannot accept a stream: {err}")),
                }
            }
        });
    }
}

/// Dials the host's control port, and greets the host.
///
/// A clone learns its own address only when its kernel has processed the reset of the device (virtio 1.2, 5.10.6.7).
/// What it sends before that is dropped, and the reset ends the streams that it finds. So a call that is lost is
/// repeated; the host takes the last one.
pub(super) async fn dial(wake: Option<Wake>) -> Result<Stream, ChannelError> {
    persist(|patience| call(wake, patience)).await
}

async fn call(wake: Option<Wake>, patience: Duration) -> Result<Stream, ChannelError> {
    let port = match wake {
        Some(wake) => wake.control_port,
        None => control_port(vsock::get_local_cid().map_err(ChannelError::Cid)?),
    };
    let failed = |source| ChannelError::Dial { port, source };
    let connected = timeout(patience, VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port))).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let mut stream = Stream::Vsock(connected.map_err(failed)?);
    // The host may be slow to answer a stream that is connected, so this has no deadline.
    preamble::greet(&mut stream).await?;
    Ok(stream)
}

/// Repeats a call that is not answered, or whose stream ends, with more patience.
async fn persist<S, F>(mut call: impl FnMut(Duration) -> F) -> Result<S, ChannelError>
where
    F: Future<Output = Result<S, ChannelError>>,
{
    let mut patience = FIRST_PATIENCE;
    for _ in 1..CALLS {
        match call(patience).await {
            Err(error @ (ChannelError::Dial { .. } | ChannelError::Greet(_))) => console::report(&error),
            other => return other,
        }
        patience = (patience * 2).min(LONGEST_PATIENCE);
    }
    call(patience).await
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// The patience of each call, in milliseconds, until one has the result of `last`.
    async fn calls(last: impl Fn(usize) -> Option<Result<(), ChannelError>>) -> (Vec<u128>, bool) {
        let made = RefCell::new(Vec::new());
        let done = persist(|patience| {
            made.borrow_mut().push(patience.as_millis());
            let reset = || Err(ChannelError::Dial { port: 7, source: io::ErrorKind::ConnectionReset.into() });
            std::future::ready(last(made.borrow().len()).unwrap_or_else(reset))
        });
        let done = done.await.is_ok();
        (made.into_inner(), done)
    }

    #[tokio::test]
    async fn a_lost_call_is_repeated_within_a_bound() {
        let greeting = |_| ChannelError::Greet(io::ErrorKind::UnexpectedEof.into());
        let third = |call| match call {
            1 => Some(Err(greeting(call))),
            3 => Some(Ok(())),
            _ => None,
        };
        assert_eq!(calls(third).await, (vec![250, 500, 1000], true));
        assert_eq!(calls(|_| None).await, (vec![250, 500, 1000, 2000, 4000, 4000, 4000, 4000], false));
    }

    #[tokio::test]
    async fn a_host_that_refuses_is_not_called_again() {
        assert_eq!(calls(|_| Some(Err(ChannelError::Refused))).await, (vec![250], false));
    }
}
