//! The messages between a keeper and `machinen attach`: a byte that says what it is, four bytes of length (big endian), and
//! the content.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Most bytes of one message.
pub(crate) const MAX_FRAME: usize = 64 << 10;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// The first one to a client: one byte, 1 if the container has a terminal.
    Hello = 0,
    Stdout = 1,
    Stderr = 2,
    /// To the keeper; an empty one is the end of stdin.
    Stdin = 3,
    /// To the keeper: columns and rows of the client's terminal, two bytes each.
    Size = 4,
    /// The last one to a client: the exit status, four bytes.
    Exit = 5,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: FrameKind,
    pub(crate) content: Vec<u8>,
}

impl Frame {
    pub(crate) fn new(kind: FrameKind, content: &[u8]) -> Self {
        Self { kind, content: content.to_vec() }
    }

    /// As it travels. The content is at most [`MAX_FRAME`] bytes long.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind as u8];
        bytes.extend_from_slice(&u32::try_from(self.content.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend_from_slice(&self.content);
        bytes
    }
}

/// Reads one message; None at the end.
///
/// # Errors
/// The connection fails, or a message is not understood.
pub(crate) async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let kind = match from.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let odd = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let kind = match kind {
        0 => FrameKind::Hello,
        1 => FrameKind::Stdout,
        2 => FrameKind::Stderr,
        3 => FrameKind::Stdin,
        4 => FrameKind::Size,
        5 => FrameKind::Exit,
        _ => return Err(odd("an unknown message")),
    };
    let length = from.read_u32().await? as usize;
    if length > MAX_FRAME {
        return Err(odd("a message that is too long"));
    }
    let mut content = vec![0; length];
    from.read_exact(&mut content).await?;
    Ok(Some(Frame { kind, content }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_message_is_read_as_it_was_written_and_bounded() {
        let frames = [Frame::new(FrameKind::Stdin, b""), Frame::new(FrameKind::Exit, &[0, 0, 0, 7])];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let mut from = bytes.as_slice();
        for frame in frames {
            assert_eq!(read_frame(&mut from).await.unwrap(), Some(frame));
        }
        assert_eq!(read_frame(&mut from).await.unwrap(), None);
        for odd in [&[9, 0, 0, 0, 0][..], &[1, 0xff, 0, 0, 0], &[1, 0, 0, 0, 2, 1]] {
            assert!(read_frame(&mut &*odd).await.is_err(), "{odd:?}");
        }
    }
}
