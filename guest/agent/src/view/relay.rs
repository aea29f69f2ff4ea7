//! Passes the host's requests to the server of a view, one at a time, and the server's replies back.
//!
//! The relay, and not the server, refuses changes while the view is read-only: the server could be in the
//! middle of one.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use machinen_protocol::fuse::{
    MAJOR, MAX_DATA, MAX_REPLY, MAX_REQUEST, MINOR, REPLY_HEADER, REQUEST_HEADER, RequestHeader, opcode,
    refusal,
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{MsgFlags, recv, send},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    sync::Mutex,
};

use crate::{channel::Stream, console, sys};

/// Allows changes, or refuses them.
#[derive(Debug, Clone, Default)]
pub(super) struct WriteGate(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    closed: AtomicBool,
    /// Locked while a change is in progress.
    changing: Mutex<()>,
}

impl WriteGate {
    /// Refuses changes until [`WriteGate::open`]. Returns when no change is in progress.
    pub(super) async fn close(&self) {
        self.0.closed.store(true, Ordering::SeqCst);
        drop(self.0.changing.lock().await);
    }

    pub(super) fn open(&self) {
        self.0.closed.store(false, Ordering::SeqCst);
    }
}

#[derive(Debug)]
pub(super) struct Relay {
    server: AsyncFd<OwnedFd>,
    gate: WriteGate,
    message: Vec<u8>,
}

impl Relay {
    /// Greets the server at the other end of `socket` as a kernel would. The server is ready when this
    /// returns.
    pub(super) async fn open(socket: OwnedFd, gate: WriteGate) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let server = sys::register(socket, Interest::READABLE | Interest::WRITABLE)?;
        let message = vec![0; MAX_REQUEST.max(MAX_REPLY)];
        let mut relay = Self { server, gate, message };
        let greeting = init();
        relay.message[..greeting.len()].copy_from_slice(&greeting);
        relay.send(greeting.len()).await?;
        relay.receive().await?;
        Ok(relay)
    }

    /// Runs until the host closes the stream or the server ends.
    pub(super) async fn run(mut self, mut stream: Stream) {
        if let Err(error) = self.pass(&mut stream).await
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            console::say(&format!("serving a container's files has ended: {error}"));
        }
    }

    async fn pass(&mut self, stream: &mut Stream) -> io::Result<()> {
        let gate = self.gate.clone();
        loop {
            stream.read_exact(&mut self.message[..REQUEST_HEADER]).await?;
            let header = self.message.first_chunk().expect("it is larger");
            let request = RequestHeader::decode(header).map_err(io::Error::other)?;
            stream.read_exact(&mut self.message[REQUEST_HEADER..request.length]).await?;
            let changes = request.changes(&self.message[REQUEST_HEADER..request.length]);
            let _changing = if changes { Some(gate.0.changing.lock().await) } else { None };
            if changes && gate.0.closed.load(Ordering::SeqCst) {
                stream.write_all(&refusal(request.unique, libc::EROFS)).await?;
                stream.flush().await?;
                continue;
            }
            self.send(request.length).await?;
            if request.is_answered() {
                let length = self.receive().await?;
                stream.write_all(&self.message[..length]).await?;
                stream.flush().await?;
            }
        }
    }

    /// Each message of the socket is one FUSE message.
    async fn send(&self, length: usize) -> io::Result<()> {
        let message = &self.message[..length];
        let send = |fd: &OwnedFd| Ok(send(fd.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL)?);
        self.server.async_io(Interest::WRITABLE, send).await.map(drop)
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let Self { server, message, .. } = self;
        let receive = |fd: &OwnedFd| Ok(recv(fd.as_raw_fd(), message, MsgFlags::empty())?);
        match server.async_io(Interest::READABLE, receive).await? {
            0 => Err(io::ErrorKind::BrokenPipe.into()),
            length if length < REPLY_HEADER => Err(io::ErrorKind::InvalidData.into()),
            length => Ok(length),
        }
    }
}

/// FUSE_INIT without flags. The server's answer is not needed: the host has decided everything already.
fn init() -> Vec<u8> {
    let no_flags = 0_u32;
    let body: Vec<u8> =
        [MAJOR, MINOR, MAX_DATA as u32, no_flags].iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = (REQUEST_HEADER + body.len()) as u32;
    let mut message = [length.to_le_bytes(), opcode::INIT.to_le_bytes()].concat();
    message.extend_from_slice(&1_u64.to_le_bytes());
    message.resize(REQUEST_HEADER, 0);
    message.extend_from_slice(&body);
    message
}
