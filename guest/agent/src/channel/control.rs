//! Watches the control stream: the agent learns when the host has closed it, and which call was answered
//! last.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{oneshot, watch},
};

use super::Stream;

/// Length of a ttrpc frame's header: length u32, stream id u32, type u8, flags u8, big endian (ttrpc
/// protocol).
const HEADER: usize = 10;

/// The stream that ttrpc gets; [`ControlWatch`] stays with the agent.
#[derive(Debug)]
pub(crate) struct ControlStream {
    stream: Stream,
    frames: Frames,
    /// The highest id of a call whose answer was written.
    answered: watch::Sender<u32>,
    /// Dropped with the stream.
    _alive: oneshot::Sender<()>,
}

#[derive(Debug)]
pub(crate) struct ControlWatch {
    answered: watch::Receiver<u32>,
    closed: oneshot::Receiver<()>,
}

/// Follows the frames in a stream of bytes that arrives in pieces of any length.
#[derive(Debug, Default)]
struct Frames {
    header: Vec<u8>,
    body_left: usize,
}

impl Frames {
    /// Takes the next bytes. Returns the id of the last frame that ends in them.
    fn pass(&mut self, mut bytes: &[u8]) -> Option<u32> {
        let mut ended = None;
        while !bytes.is_empty() || (self.header.len() == HEADER && self.body_left == 0) {
            if self.header.len() < HEADER {
                let (head, rest) = bytes.split_at(bytes.len().min(HEADER - self.header.len()));
                self.header.extend_from_slice(head);
                bytes = rest;
                if self.header.len() == HEADER {
                    self.body_left = be32(&self.header[..4]) as usize;
                }
            } else {
                let length = bytes.len().min(self.body_left);
                self.body_left -= length;
                bytes = &bytes[length..];
                if self.body_left == 0 {
                    ended = Some(be32(&self.header[4..8]));
                    self.header.clear();
                }
            }
        }
        ended
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

impl ControlStream {
    pub(super) fn new(stream: Stream) -> (Self, ControlWatch) {
        let (alive, closed) = oneshot::channel();
        let (answered, watch) = watch::channel(0);
        let stream = Self { stream, frames: Frames::default(), answered, _alive: alive };
        (stream, ControlWatch { answered: watch, closed })
    }
}

impl ControlWatch {
    /// Resolves when ttrpc has dropped the stream, because the host has closed it or broken the protocol.
    pub(crate) async fn closed(&mut self) {
        let _ = (&mut self.closed).await;
    }

    /// Resolves when the answer to this call or to a later one was written, or never will be.
    pub(crate) async fn answered(&mut self, call: u32) {
        let _ = self.answered.wait_for(|answered| *answered >= call).await;
    }
}

impl AsyncRead for ControlStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(written)) = &poll
            && let Some(call) = this.frames.pass(&bytes[..*written])
        {
            this.answered.send_if_modified(|last| call > std::mem::replace(last, call.max(*last)));
        }
        poll
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_followed_through_any_pieces() {
        let mut bytes = Vec::new();
        for (id, body) in [(1_u32, &b"hello"[..]), (3, b""), (0x0102_0305, b"x")] {
            bytes.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
            bytes.extend(id.to_be_bytes());
            bytes.extend([2, 0]);
            bytes.extend(body);
        }
        let mut frames = Frames::default();
        assert_eq!(frames.pass(&bytes), Some(0x0102_0305));
        let ended: Vec<_> = bytes.iter().filter_map(|byte| frames.pass(&[*byte])).collect();
        assert_eq!(ended, [1, 3, 0x0102_0305]);
    }
}
