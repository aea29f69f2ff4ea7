//! Joins the data of small yamux frames, so that the memory of a stream that is not read is bounded by its
//! bytes. yamux keeps each frame that it has received in an allocation of its own: a guest that sends a byte
//! a frame would make it grow to many times the window.
//!
//! ```text
//!   guest ──frames──> JoinedSocket ──> yamux ──> JoinedStream
//!                       │  staged bytes of each stream     │ how many bytes were read
//!                       └────────── StreamTable <──────────┘
//! ```
//! yamux has at most one frame with data of a stream at a time. What arrives until its reader has taken all of
//! it is staged, and becomes the next frame. yamux's windows go on to limit what the guest may send, since
//! they are granted for what has been read.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _};

/// Length of a frame's header: version u8, type u8, flags u16, stream u32, length u32, big endian (yamux
/// specification, "Framing").
const HEADER: usize = 12;
const DATA: u8 = 0;
const WINDOW_UPDATE: u8 = 1;
const SYN: u16 = 1;
const ACK: u16 = 2;
const FIN: u16 = 4;
const RST: u16 = 8;
/// Most bytes of a frame with joined data; yamux takes 1 MiB.
const FRAME: usize = 256 << 10;
/// Bytes that are read from the socket at once.
const READ: usize = 64 << 10;

/// The streams that are open, shared by the connection and its streams.
#[derive(Debug, Clone)]
pub(super) struct StreamTable(Arc<Mutex<OpenStreams>>);

#[derive(Debug)]
struct OpenStreams {
    streams: HashMap<u32, StagedBytes>,
    /// Streams with staged bytes whose reader has taken all that yamux had.
    ready: Vec<u32>,
    /// Sum of the staged bytes, and its limit.
    staged: usize,
    limit: usize,
    reader: Option<Waker>,
}

#[derive(Debug, Default)]
struct StagedBytes {
    bytes: Vec<u8>,
    /// Bytes that yamux has and that were not read yet.
    unread: usize,
    acknowledged: bool,
    /// The guest has ended its direction of the stream.
    finished: bool,
}

/// The guest's socket as yamux reads it.
#[derive(Debug)]
pub(super) struct JoinedSocket<S> {
    socket: S,
    table: StreamTable,
    header: Vec<u8>,
    /// What is left of the body of the current frame, and the stream that it is staged for.
    body: (usize, Option<u32>),
    /// Frames for yamux.
    out: Vec<u8>,
    taken: usize,
    ended: bool,
    /// Room for what is read from the socket.
    buffer: Box<[u8]>,
}

/// A stream that reports what has been read from it.
#[derive(Debug)]
pub(super) struct JoinedStream {
    stream: Compat<yamux::Stream>,
    id: u32,
    table: StreamTable,
}

impl StreamTable {
    /// `limit`: the most bytes that all streams together may have.
    pub(super) fn new(limit: usize) -> Self {
        let streams = HashMap::new();
        Self(Arc::new(Mutex::new(OpenStreams { streams, ready: Vec::new(), staged: 0, limit, reader: None })))
    }

    /// Registers a stream. Until then its frames pass as they are.
    pub(super) fn open(&self, stream: yamux::Stream) -> JoinedStream {
        let id = stream.id().val();
        self.lock().streams.insert(id, StagedBytes::default());
        JoinedStream { stream: stream.compat(), id, table: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, OpenStreams> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenStreams {
    fn stage(&mut self, id: u32, bytes: &[u8]) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(()) };
        if self.staged + bytes.len() > self.limit {
            return Err(invalid("the guest sends more than its windows allow"));
        }
        if stream.bytes.is_empty() && stream.unread == 0 && !bytes.is_empty() {
            self.ready.push(id);
        }
        stream.bytes.extend_from_slice(bytes);
        self.staged += bytes.len();
        Ok(())
    }

    /// Appends the staged bytes of a stream to `out`, in as few frames as possible.
    fn emit(&mut self, id: u32, out: &mut Vec<u8>) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let bytes = std::mem::take(&mut stream.bytes);
        if bytes.is_empty() {
            return;
        }
        stream.unread += bytes.len();
        self.staged -= bytes.len();
        for piece in bytes.chunks(FRAME) {
            out.extend(header(DATA, 0, id, piece.len()));
            out.extend(piece);
        }
    }

    fn was_read(&mut self, id: u32, length: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.unread = stream.unread.saturating_sub(length);
        if stream.unread == 0 && !stream.bytes.is_empty() {
            self.ready.push(id);
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn header(kind: u8, flags: u16, stream: u32, length: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[1] = kind;
    header[2..4].copy_from_slice(&flags.to_be_bytes());
    header[4..8].copy_from_slice(&stream.to_be_bytes());
    header[8..].copy_from_slice(&(length as u32).to_be_bytes());
    header
}

impl<S> JoinedSocket<S> {
    pub(super) fn new(socket: S, table: StreamTable) -> Self {
        let (header, out) = (Vec::with_capacity(HEADER), Vec::new());
        let buffer = vec![0; READ].into_boxed_slice();
        Self { socket, table, header, body: (0, None), out, taken: 0, ended: false, buffer }
    }

    /// Takes bytes of the guest: stages the data of open streams, and passes on everything else.
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let table = self.table.clone();
        let mut table = table.lock();
        while !bytes.is_empty() {
            let (left, staged_for) = self.body;
            if left > 0 {
                let (now, rest) = bytes.split_at(left.min(bytes.len()));
                match staged_for {
                    Some(id) => table.stage(id, now)?,
                    None => self.out.extend_from_slice(now),
                }
                self.body.0 -= now.len();
                bytes = rest;
                continue;
            }
            let (head, rest) = bytes.split_at(bytes.len().min(HEADER - self.header.len()));
            self.header.extend_from_slice(head);
            bytes = rest;
            if self.header.len() == HEADER {
                let begun = self.begin(&mut table);
                self.header.clear();
                begun?;
            }
        }
        Ok(())
    }

    /// Begins the frame whose header is complete.
    fn begin(&mut self, table: &mut OpenStreams) -> io::Result<()> {
        let word = |at: usize| u32::from_be_bytes(self.header[at..at + 4].try_into().expect("four bytes"));
        let (kind, flags) = (self.header[1], u16::from_be_bytes([self.header[2], self.header[3]]));
        let (id, length) = (word(4), word(8));
        if kind != DATA {
            // Only frames with data have a body.
            self.out.extend_from_slice(&self.header);
            return Ok(());
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        match table.streams.get_mut(&id) {
            Some(stream) if stream.finished && flags & RST == 0 => {
                return Err(invalid("the guest sends data after the end of a stream"));
            }
            Some(stream) if flags & (SYN | FIN | RST) == 0 => {
                if flags & ACK != 0 && !std::mem::replace(&mut stream.acknowledged, true) {
                    self.out.extend(header(WINDOW_UPDATE, ACK, id, 0));
                }
                self.body = (length, Some(id));
            }
            _ => {
                if let Some(stream) = table.streams.get_mut(&id) {
                    stream.finished = true;
                }
                // The end of a stream follows its data.
                table.emit(id, &mut self.out);
                self.out.extend_from_slice(&self.header);
                self.body = (length, None);
            }
        }
        Ok(())
    }

    /// Emits what may be emitted: all of it when the socket has ended.
    fn emit(&mut self, cx: &Context<'_>) {
        let table = self.table.clone();
        let mut table = table.lock();
        let mut ready = std::mem::take(&mut table.ready);
        if self.ended {
            ready.extend(table.streams.keys());
        }
        ready.into_iter().for_each(|id| table.emit(id, &mut self.out));
        table.reader = Some(cx.waker().clone());
    }
}

impl<S: futures_io::AsyncRead + Unpin> futures_io::AsyncRead for JoinedSocket<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            if this.taken < this.out.len() {
                let length = buffer.len().min(this.out.len() - this.taken);
                buffer[..length].copy_from_slice(&this.out[this.taken..this.taken + length]);
                this.taken += length;
                return Poll::Ready(Ok(length));
            }
            (this.out, this.taken) = (Vec::new(), 0);
            this.emit(cx);
            if !this.out.is_empty() {
                continue;
            }
            if this.ended {
                return Poll::Ready(Ok(0));
            }
            let mut bytes = std::mem::take(&mut this.buffer);
            let read = Pin::new(&mut this.socket).poll_read(cx, &mut bytes);
            let taken = match read {
                Poll::Ready(Ok(length @ 1..)) => this.take(&bytes[..length]),
                _ => Ok(()),
            };
            this.buffer = bytes;
            taken?;
            match read {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => this.ended = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl<S: futures_io::AsyncWrite + Unpin> futures_io::AsyncWrite for JoinedSocket<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx)
    }
}

impl Drop for JoinedStream {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if let Some(stream) = table.streams.remove(&self.id) {
            table.staged -= stream.bytes.len();
        }
    }
}

impl AsyncRead for JoinedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        let length = buf.filled().len() - before;
        if length > 0 {
            this.table.lock().was_read(this.id, length);
        }
        read
    }
}

impl AsyncWrite for JoinedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
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
    use tokio::io::AsyncReadExt as _;
    use tokio_util::compat::TokioAsyncReadCompatExt as _;

    use super::*;

    fn frame(flags: u16, id: u32, data: &[u8]) -> Vec<u8> {
        [&header(DATA, flags, id, data.len())[..], data].concat()
    }

    /// A socket with that stream open, and all of `input` to read.
    fn socket(id: u32, input: Vec<u8>) -> JoinedSocket<Compat<io::Cursor<Vec<u8>>>> {
        let table = StreamTable::new(1 << 20);
        table.lock().streams.insert(id, StagedBytes::default());
        JoinedSocket::new(io::Cursor::new(input).compat(), table)
    }

    fn ready(socket: &mut JoinedSocket<impl futures_io::AsyncRead + Unpin>) -> Vec<u8> {
        socket.emit(&Context::from_waker(Waker::noop()));
        std::mem::take(&mut socket.out)
    }

    #[test]
    fn a_byte_a_frame_becomes_one_frame() {
        let mut socket = socket(7, Vec::new());
        socket.take(&frame(0, 7, b"a")).unwrap();
        assert_eq!(ready(&mut socket), frame(0, 7, b"a"));
        for _ in 0..100_000 {
            socket.take(&frame(0, 7, b"b")).unwrap();
            socket.take(&frame(0, 7, b"")).unwrap();
        }
        assert!(ready(&mut socket).is_empty(), "the first byte was not read");
        socket.table.lock().was_read(7, 1);
        assert_eq!(ready(&mut socket), frame(0, 7, &[b'b'; 100_000]));
        assert_eq!(socket.table.lock().staged, 0);
    }

    #[test]
    fn other_frames_pass_in_order() {
        let mut socket = socket(7, Vec::new());
        let ping = header(2, 1, 0, 99);
        let unknown = frame(1, 9, b"opens another stream");
        let mut input = frame(ACK, 7, b"first");
        input.extend(ping);
        input.extend(&unknown);
        input.extend(frame(ACK, 7, b" second"));
        input.extend(frame(FIN, 7, b" last"));
        // In pieces of any length.
        input.chunks(5).for_each(|piece| socket.take(piece).unwrap());
        let mut wanted = header(WINDOW_UPDATE, ACK, 7, 0).to_vec();
        wanted.extend(ping);
        wanted.extend(&unknown);
        wanted.extend(frame(0, 7, b"first second"));
        wanted.extend(frame(FIN, 7, b" last"));
        assert_eq!(ready(&mut socket), wanted);
    }

    #[test]
    fn much_data_is_several_frames() {
        let mut socket = socket(7, Vec::new());
        for _ in 0..10 {
            socket.take(&frame(0, 7, &[1; 30_000])).unwrap();
        }
        let wanted = [frame(0, 7, &[1; FRAME]), frame(0, 7, &[1; 300_000 - FRAME])].concat();
        assert!(ready(&mut socket) == wanted);
    }

    #[test]
    fn no_flag_makes_small_frames_pass() {
        let mut socket = socket(7, Vec::new());
        for _ in 0..1000 {
            socket.take(&frame(ACK | 0x10, 7, b"x")).unwrap();
        }
        let wanted = [&header(WINDOW_UPDATE, ACK, 7, 0)[..], &frame(0, 7, &[b'x'; 1000])].concat();
        assert_eq!(ready(&mut socket), wanted);
        socket.take(&frame(FIN, 7, b"x")).unwrap();
        assert!(socket.take(&frame(FIN, 7, b"x")).is_err() && socket.take(&frame(RST, 7, b"")).is_ok());
    }

    #[test]
    fn all_streams_together_are_limited() {
        let mut socket = socket(7, Vec::new());
        let chunk = frame(0, 7, &[0; 64 << 10]);
        let refused = (0..17).map(|_| socket.take(&chunk)).position(|taken| taken.is_err());
        assert_eq!(refused, Some(16));
    }

    #[tokio::test]
    async fn what_is_staged_arrives_before_the_end() {
        let socket = socket(7, [frame(0, 7, b"a"), frame(0, 7, b"b")].concat());
        let mut all = Vec::new();
        socket.compat().read_to_end(&mut all).await.unwrap();
        assert_eq!(all, frame(0, 7, b"ab"));
    }
}
