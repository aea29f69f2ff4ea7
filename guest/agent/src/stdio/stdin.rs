//! Moves a process's stdin from the host to its pipe or terminal.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::watch,
};

use super::{
    pump::{BUFFER, InputSink},
    unread::{Backlog, Pipe},
};
use crate::channel::Stream;

/// The source and the destination of a process's stdin.
#[derive(Debug)]
pub(crate) struct Input<S = Stream> {
    /// None: the backlog is all that the process gets.
    pub(super) stream: Option<S>,
    pub(super) sink: InputSink,
}

impl Input {
    pub(crate) fn has_stream(&self) -> bool {
        self.stream.is_some()
    }
}

/// The state of a process's stdin. All clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Stdin {
    pipe: Option<Arc<Pipe>>,
    backlog: Arc<Mutex<Backlog>>,
    arrived: watch::Sender<Arrived>,
    /// Number of all bytes that the host has sent, once it has reported the end.
    total: watch::Sender<Option<u64>>,
    /// Number of bytes to take from the host even if the process does not read those before them.
    wanted: watch::Sender<u64>,
}

/// How much the host's stream has delivered.
#[derive(Debug, Clone, Copy)]
struct Arrived {
    bytes: u64,
    /// The stream delivers no more.
    over: bool,
}

impl Stdin {
    /// `unread` are the bytes that a checkpoint has carried over, which come before everything from the host;
    /// `has_stream` says whether there is a stream from the host.
    pub(crate) fn new(pipe: Option<Pipe>, unread: &[u8], has_stream: bool) -> Self {
        let mut backlog = Backlog::default();
        backlog.push(unread);
        Self {
            pipe: pipe.map(Arc::new),
            backlog: Arc::new(Mutex::new(backlog)),
            arrived: watch::Sender::new(Arrived { bytes: 0, over: !has_stream }),
            total: watch::Sender::new(None),
            wanted: watch::Sender::new(0),
        }
    }

    /// Records that the host has sent its last byte. False when more than `total` bytes have arrived already.
    pub(crate) fn end_at(&self, total: u64) -> bool {
        if self.arrived.borrow().bytes > total {
            return false;
        }
        self.total.send_replace(Some(total));
        true
    }

    /// What the process has not read of at least the first `sent` bytes from the host. The process must be
    /// frozen; its stdin stays unchanged.
    ///
    /// # Errors
    /// More bytes are unread than a checkpoint carries over, or the kernel cannot copy them.
    pub(crate) async fn unread(&self, sent: u64) -> io::Result<Vec<u8>> {
        let Some(pipe) = &self.pipe else { return Ok(Vec::new()) };
        self.wanted.send_if_modified(|wanted| {
            let more = sent > *wanted;
            *wanted = sent.max(*wanted);
            more
        });
        let mut arrived = self.arrived.subscribe();
        // The sender is part of self, so this cannot fail.
        let _ = arrived.wait_for(|arrived| arrived.over || arrived.bytes >= sent).await;
        // The agent has one thread and there is no await here, so no byte moves meanwhile.
        pipe.unread(&self.backlog())
    }

    /// Moves bytes to the process: first the backlog, then the host's bytes until the announced end, or until
    /// either side closes.
    pub(crate) fn pump<S: AsyncRead + Unpin>(self, input: Input<S>) -> impl Future<Output = ()> {
        // Created now, since the task may be aborted before it runs.
        let over = EndArrivals(self.arrived.clone());
        async move {
            self.move_bytes(input).await;
            drop(over);
        }
    }

    async fn move_bytes<S: AsyncRead + Unpin>(&self, input: Input<S>) {
        let Input { mut stream, sink } = input;
        let (mut total, mut wanted) = (self.total.subscribe(), self.wanted.subscribe());
        let mut buffer = vec![0; BUFFER];
        loop {
            let arrived = self.arrived.borrow().bytes;
            let left = match *total.borrow_and_update() {
                None => BUFFER,
                Some(total) => usize::try_from(total.saturating_sub(arrived)).unwrap_or(BUFFER).min(BUFFER),
            };
            if left == 0 {
                stream = None;
            }
            let waits = !self.backlog().bytes().is_empty();
            if !waits && stream.is_none() {
                return;
            }
            // If the process does not read, the host has to wait, except for a checkpoint.
            let reads = !waits || arrived < *wanted.borrow_and_update();
            tokio::select! {
                read = read(&mut stream, &mut buffer[..left]), if reads => match read {
                    Ok(length @ 1..) => {
                        self.backlog().push(&buffer[..length]);
                        self.arrived.send_modify(|arrived| arrived.bytes += length as u64);
                    }
                    _ => {
                        stream = None;
                        self.arrived.send_modify(|arrived| arrived.over = true);
                    }
                },
                written = sink.write_some(&self.backlog), if waits => {
                    if written.is_err() {
                        // No process reads it any more.
                        self.backlog().clear();
                        return;
                    }
                }
                changed = total.changed() => if changed.is_err() { return },
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads from the stream; without one, waits forever.
async fn read(stream: &mut Option<impl AsyncRead + Unpin>, buffer: &mut [u8]) -> io::Result<usize> {
    match stream {
        Some(stream) => stream.read(buffer).await,
        None => std::future::pending().await,
    }
}

/// Records that the stream delivers no more, however the pump ends.
struct EndArrivals(watch::Sender<Arrived>);

impl Drop for EndArrivals {
    fn drop(&mut self) {
        self.0.send_modify(|arrived| arrived.over = true);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::OwnedFd};

    use nix::{fcntl::OFlag, unistd::pipe2};
    use tokio::{
        io::{AsyncWriteExt as _, DuplexStream, duplex},
        net::unix::pipe,
    };

    use super::*;

    /// The stdin of a process that reads from the file.
    fn made(unread: &[u8], stream: Option<DuplexStream>) -> (File, Stdin, Input<DuplexStream>) {
        let (read, write): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let pipe = Pipe::of(&write).unwrap();
        let stdin = Stdin::new(Some(pipe), unread, stream.is_some());
        let sink = InputSink::Pipe(pipe::Sender::from_owned_fd(write).unwrap());
        (read.into(), stdin, Input { stream, sink })
    }

    fn numbers(range: std::ops::Range<u32>) -> Vec<u8> {
        range.flat_map(u32::to_le_bytes).collect()
    }

    #[tokio::test]
    async fn what_is_unread_is_in_order_and_is_read_all_the_same() {
        let (mut host, guest) = duplex(8 << 10);
        let (mut read, stdin, input) = made(b"", Some(guest));
        let pump = tokio::spawn(stdin.clone().pump(input));
        // More than the pipe holds, and more than the pump takes without a checkpoint.
        let all = numbers(0..200_000);
        let (sent, to_send) = (all.len() as u64, all.clone());
        let sender = tokio::spawn(async move {
            host.write_all(&to_send).await.unwrap();
            host
        });
        assert!(stdin.unread(sent).await.unwrap() == all);
        let _host = sender.await.unwrap();
        // What the process has read in the meantime is not unread.
        let mut first = vec![0; 50_000];
        read.read_exact(&mut first).unwrap();
        assert!(stdin.end_at(sent));
        assert!(stdin.unread(sent).await.unwrap() == all[50_000..]);
        let mut rest = Vec::new();
        let rest =
            tokio::task::spawn_blocking(move || read.read_to_end(&mut rest).map(|_| rest)).await.unwrap();
        assert!([first, rest.unwrap()].concat() == all);
        pump.await.unwrap();
        assert!(stdin.unread(sent).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_was_carried_over_comes_first() {
        let (mut host, guest) = duplex(64);
        let (mut read, stdin, input) = made(b"carried ", Some(guest));
        assert_eq!(stdin.unread(0).await.unwrap(), b"carried ");
        let pump = tokio::spawn(stdin.clone().pump(input));
        host.write_all(b"over").await.unwrap();
        assert_eq!(stdin.unread(4).await.unwrap(), b"carried over");
        assert!(stdin.end_at(4) && !stdin.end_at(3));
        pump.await.unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "carried over");
    }

    #[tokio::test]
    async fn without_a_stream_it_ends_after_what_was_carried_over() {
        let all = numbers(0..100_000);
        let (mut read, stdin, input) = made(&all, None);
        let pump = tokio::spawn(stdin.clone().pump(input));
        assert!(stdin.unread(0).await.unwrap() == all);
        let mut rest = Vec::new();
        let rest =
            tokio::task::spawn_blocking(move || read.read_to_end(&mut rest).map(|_| rest)).await.unwrap();
        assert!(rest.unwrap() == all);
        pump.await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_has_closed_it_has_nothing_unread() {
        let (mut host, guest) = duplex(64);
        let (read, stdin, input) = made(b"", Some(guest));
        drop(read);
        let pump = tokio::spawn(stdin.clone().pump(input));
        host.write_all(b"unread").await.unwrap();
        pump.await.unwrap();
        // Even if the host reports that it has sent more.
        assert_eq!(stdin.unread(1000).await.unwrap(), b"");
    }
}
