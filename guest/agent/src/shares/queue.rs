//! Passes the kernel's requests to the host on one stream, one at a time, and the replies back.

use std::{io, os::fd::OwnedFd, sync::Arc};

use machinen_protocol::{
    fuse::{REPLY_HEADER, REQUEST_HEADER, ReplyHeader, RequestHeader, opcode},
    shares::{MAX_MESSAGE, is_answered},
    sockets::SocketKind,
};
use nix::errno::Errno;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    sync::Mutex,
};

use super::{
    replaced::Renaming,
    sockets::{
        Lookup, NewSocket, Sockets,
        messages::{Entry, acknowledgement, forget, question, take_sockets},
    },
};
use crate::{channel::Stream, console};

type Device = Arc<AsyncFd<OwnedFd>>;

/// Bytes of requests without a reply that are sent at once.
const MAX_UNSENT: usize = 16 << 10;
/// Room for the reply to a lookup, bytes.
const SHORT_REPLY: usize = 256;

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) device: Device,
    pub(super) sockets: Arc<Sockets>,
    pub(super) renaming: Arc<Renaming>,
    /// Held by the queue that waits for a request: all of them would wake up for each.
    pub(super) turn: Arc<Mutex<()>>,
    pub(super) stream: Stream,
    /// Requests that the host does not reply to. They are sent with the next one that it does reply to, or when the kernel
    /// has no further request.
    pub(super) unsent: Vec<u8>,
}

impl Queue {
    /// Runs until the file system is unmounted, or the stream ends.
    ///
    /// # Errors
    /// The stream has failed, or the host sent what is not a reply to the request.
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut message = vec![0; MAX_MESSAGE];
        while let Some(request) = self.next(&mut message).await? {
            self.pass_on(request, &mut message).await?;
        }
        Ok(())
    }

    /// The next request that the host replies to, in `message`. None: the file system was unmounted.
    async fn next(&mut self, message: &mut [u8]) -> io::Result<Option<RequestHeader>> {
        let turn = Arc::clone(&self.turn);
        let _turn = turn.lock().await;
        loop {
            let request = match read(&self.device, message).await? {
                Some(Read::Request(request)) => request,
                Some(Read::None) => {
                    self.send(&[]).await?;
                    continue;
                }
                None => return Ok(None),
            };
            if !self.is_done(request, &message[..request.length])? {
                return Ok(Some(request));
            }
            if self.unsent.len() >= MAX_UNSENT {
                self.send(&[]).await?;
            }
        }
    }

    /// Does what a request asks for, if that takes no reply from the host. Otherwise false.
    fn is_done(&mut self, request: RequestHeader, message: &[u8]) -> io::Result<bool> {
        // A request that is being answered cannot be given up. With the last file of a file system that is unmounted
        // nothing is left to be done on the host.
        if matches!(request.opcode, opcode::INTERRUPT | opcode::DESTROY) {
            return Ok(true);
        }
        let body = &message[REQUEST_HEADER..];
        let own = self.sockets.answer(request, body).or_else(|| self.renaming.answer(request, body));
        if let Some(answer) = own {
            if !answer.is_empty() {
                write(&self.device, &answer)?;
            }
            return Ok(true);
        }
        self.sockets.forget(request, body);
        if is_answered(request.opcode) {
            return Ok(false);
        }
        self.unsent.extend_from_slice(message);
        self.acknowledge(request)?;
        Ok(true)
    }

    /// Sends a request to the host, and the reply to the kernel.
    async fn pass_on(&mut self, request: RequestHeader, message: &mut [u8]) -> io::Result<()> {
        let sent = &message[..request.length];
        let lookup = if request.opcode == opcode::LOOKUP { sent.to_vec() } else { Vec::new() };
        self.send(sent).await?;
        let length = self.receive(request.unique, message).await?;
        let reply = &mut message[..length];
        match request.opcode {
            opcode::LOOKUP | opcode::MKNOD | opcode::LINK => self.give_entry(request, reply, &lookup).await,
            opcode::READDIRPLUS => {
                let sockets = take_sockets(&mut reply[REPLY_HEADER..]);
                write(&self.device, reply)?;
                for node in sockets {
                    self.unsent.extend_from_slice(&forget(node));
                }
                Ok(())
            }
            _ => write(&self.device, reply),
        }
    }

    /// Replies to a request that the host does not reply to, if the kernel expects it.
    fn acknowledge(&self, request: RequestHeader) -> io::Result<()> {
        if request.is_answered() { write(&self.device, &acknowledgement(request.unique)) } else { Ok(()) }
    }

    /// Gives the kernel the reply to a request for an entry. If it is a socket of the host, the agent has bound its own by
    /// then: a task waits for that, because the kernel asks the queues meanwhile.
    async fn give_entry(&mut self, request: RequestHeader, reply: &[u8], lookup: &[u8]) -> io::Result<()> {
        let found =
            Entry::of_reply(reply).map_or(Lookup::Known, |entry| self.sockets.examine(request, &entry));
        let (device, reply) = (Arc::clone(&self.device), reply.to_vec());
        match found {
            Lookup::Known => return write(&device, &reply),
            Lookup::Waits(mut bound) => drop(tokio::spawn(async move {
                // Where it cannot be bound, the kernel gets the reply too.
                drop(bound.wait_for(|bound| *bound).await);
                finish(&device, &reply);
            })),
            Lookup::New(socket) => {
                let entry = self.entry_to_bind(&socket, request.unique, lookup).await?;
                let Some(entry) = entry else { return write(&device, &reply) };
                drop(tokio::spawn(async move {
                    if let Err(error) = socket.bind(entry).await {
                        console::say(&format!("a socket of the host cannot be reached: {error}"));
                    }
                    finish(&device, &reply);
                }));
            }
        }
        Ok(())
    }

    /// Looks a socket up once more, for the agent's own name. None: the host has no such socket any more, or it takes no
    /// connections.
    async fn entry_to_bind(
        &mut self,
        socket: &NewSocket,
        unique: u64,
        lookup: &[u8],
    ) -> io::Result<Option<Entry>> {
        let mut reply = [0; SHORT_REPLY];
        self.send(&question(unique, socket.node())).await?;
        let length = self.receive(unique, &mut reply).await?;
        if SocketKind::decode(&reply[REPLY_HEADER..length]) != Some(SocketKind::Connections) {
            return Ok(None);
        }
        self.send(lookup).await?;
        let length = self.receive(unique, &mut reply).await?;
        match Entry::of_reply(&reply[..length]) {
            Some(entry) if entry.node() == socket.node() => Ok(Some(entry)),
            // Another file has the name by now.
            Some(entry) => self.send(&forget(entry.node())).await.map(|()| None),
            None => Ok(None),
        }
    }

    /// Sends what has not been sent yet, and this.
    async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        if self.unsent.is_empty() {
            self.stream.write_all(message).await?;
        } else {
            // One write to the stream is one to the device.
            self.unsent.extend_from_slice(message);
            self.stream.write_all(&self.unsent).await?;
            self.unsent.clear();
        }
        self.stream.flush().await
    }

    /// Receives the reply to the request `unique`, and returns its length.
    async fn receive(&mut self, unique: u64, message: &mut [u8]) -> io::Result<usize> {
        let most = message.len();
        let (header, body) = message.split_at_mut(REPLY_HEADER);
        self.stream.read_exact(header).await?;
        let header = header.as_array().expect("split there");
        let reply = ReplyHeader::decode_within(header, most).map_err(io::Error::other)?;
        if reply.unique != unique {
            return Err(io::Error::other("the host's reply is to another request"));
        }
        self.stream.read_exact(&mut body[..reply.length - REPLY_HEADER]).await?;
        Ok(reply.length)
    }
}

/// What a read from the device has found.
enum Read {
    Request(RequestHeader),
    /// There is no request at the moment, and the next read waits for one.
    None,
}

/// Reads a request. None: the file system was unmounted.
async fn read(device: &AsyncFd<OwnedFd>, message: &mut [u8]) -> io::Result<Option<Read>> {
    loop {
        let mut ready = device.readable().await?;
        let length = match ready.try_io(|device| Ok(nix::unistd::read(device, message)?)) {
            Err(_) => return Ok(Some(Read::None)),
            Ok(Ok(length)) => length,
            Ok(Err(error)) => match error.raw_os_error() {
                // The calling process has given up.
                Some(libc::ENOENT | libc::EINTR) => continue,
                Some(libc::ENODEV | libc::ECONNABORTED) => return Ok(None),
                _ => return Err(error),
            },
        };
        let header = message[..length].first_chunk::<REQUEST_HEADER>();
        let header = header.ok_or(io::ErrorKind::InvalidData)?;
        let request = RequestHeader::decode_within(header, MAX_MESSAGE).map_err(io::Error::other)?;
        return Ok(Some(Read::Request(request)));
    }
}

/// Writes a reply from a task. The queues find out whether the file system is gone.
fn finish(device: &AsyncFd<OwnedFd>, reply: &[u8]) {
    if let Err(error) = write(device, reply) {
        console::say(&format!("a file of a volume cannot be looked up: {error}"));
    }
}

fn write(device: &AsyncFd<OwnedFd>, reply: &[u8]) -> io::Result<()> {
    match nix::unistd::write(device.get_ref(), reply) {
        // Nothing waits for the reply any more.
        Ok(_) | Err(Errno::ENOENT | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
