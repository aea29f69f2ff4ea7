//! A process's stdin on its way from the host to its pipe or terminal.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::watch,
};

use super::{
    pump::{BUFFER, Sink},
    unread::{Pipe, Waiting},
};
use crate::channel::Stream;

/// Where the bytes of a process's stdin come from, and go to.
#[derive(Debug)]
pub(crate) struct Input<S = Stream> {
    /// None: what waits is all.
    pub(super) stream: Option<S>,
    pub(super) sink: Sink,
}

impl Input {
    pub(crate) fn has_stream(&self) -> bool {
        self.stream.is_some()
    }
}

/// How far the stdin of a process is. All clones are of the same.
#[derive(Debug, Clone)]
pub(crate) struct Stdin {
    pipe: Option<Arc<Pipe>>,
    waiting: Arc<Mutex<Waiting>>,
    taken: watch::Sender<Taken>,
    /// Bytes that the host has sent in all, once that is known.
    total: watch::Sender<Option<u64>>,
    /// Bytes that are to be taken even if the process does not read those before them.
    wanted: watch::Sender<u64>,
}

/// What of the host's bytes has arrived.
#[derive(Debug, Clone, Copy)]
struct Taken {
    bytes: u64,
    /// No more will be.
    over: bool,
}

impl Stdin {
    /// `unread`: what a checkpoint has carried over, which comes before all that the host sends, if there is a stream from it.
    pub(crate) fn new(pipe: Option<Pipe>, unread: &[u8], has_stream: bool) -> Self {
        let mut waiting = Waiting::default();
        waiting.push(unread);
        Self {
            pipe: pipe.map(Arc::new),
            waiting: Arc::new(Mutex::new(waiting)),
            taken: watch::Sender::new(Taken { bytes: 0, over: !has_stream }),
            total: watch::Sender::new(None),
            wanted: watch::Sender::new(0),
        }
    }

    /// The host has sent its last byte. False when more than `total` bytes have been read already.
    pub(crate) fn end_at(&self, total: u64) -> bool {
        if self.taken.borrow().bytes > total {
            return false;
        }
        self.total.send_replace(Some(total));
        true
    }

    /// What the process has not read of the first `sent` bytes of the host's, or of more. The process does not run, and all
    /// stays where it is.
    ///
    /// # Errors
    /// It is more than is carried over, or the kernel does not copy it.
    pub(crate) async fn unread(&self, sent: u64) -> io::Result<Vec<u8>> {
        let Some(pipe) = &self.pipe else { return Ok(Vec::new()) };
        self.wanted.send_if_modified(|wanted| {
            let more = sent > *wanted;
            *wanted = sent.max(*wanted);
            more
        });
        let mut taken = self.taken.subscribe();
        // The sender lives in self.
        let _ = taken.wait_for(|taken| taken.over || taken.bytes >= sent).await;
        // Nothing moves between the two: there is one thread, and no await.
        pipe.unread(&self.waiting())
    }

    /// Moves bytes to the process: those that wait, then the host's until the announced end, or until either side has closed.
    pub(crate) fn pump<S: AsyncRead + Unpin>(self, input: Input<S>) -> impl Future<Output = ()> {
        // From now on: the task may be ended before it runs.
        let over = Over(self.taken.clone());
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
            let taken = self.taken.borrow().bytes;
            let left = match *total.borrow_and_update() {
                None => BUFFER,
                Some(total) => usize::try_from(total.saturating_sub(taken)).unwrap_or(BUFFER).min(BUFFER),
            };
            if left == 0 {
                stream = None;
            }
            let waits = !self.waiting().bytes().is_empty();
            if !waits && stream.is_none() {
                return;
            }
            // A process that does not read makes the host wait, but for a checkpoint.
            let reads = !waits || taken < *wanted.borrow_and_update();
            tokio::select! {
                read = read(&mut stream, &mut buffer[..left]), if reads => match read {
                    Ok(length @ 1..) => {
                        self.waiting().push(&buffer[..length]);
                        self.taken.send_modify(|taken| taken.bytes += length as u64);
                    }
                    _ => {
                        stream = None;
                        self.taken.send_modify(|taken| taken.over = true);
                    }
                },
                written = sink.write_some(&self.waiting), if waits => {
                    if written.is_err() {
                        // There is no process for it.
                        self.waiting().clear();
                        return;
                    }
                }
                changed = total.changed() => if changed.is_err() { return },
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without a stream there is nothing to read, ever.
async fn read(stream: &mut Option<impl AsyncRead + Unpin>, buffer: &mut [u8]) -> io::Result<usize> {
    match stream {
        Some(stream) => stream.read(buffer).await,
        None => std::future::pending().await,
    }
}

/// Says that no more bytes will be taken, however the pump ends.
struct Over(watch::Sender<Taken>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.send_modify(|taken| taken.over = true);
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
        let sink = Sink::Pipe(pipe::Sender::from_owned_fd(write).unwrap());
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
        // More than the pipe, and then more than the pump takes of its own accord.
        let all = numbers(0..200_000);
        let (sent, to_send) = (all.len() as u64, all.clone());
        let sender = tokio::spawn(async move {
            host.write_all(&to_send).await.unwrap();
            host
        });
        assert!(stdin.unread(sent).await.unwrap() == all);
        let _host = sender.await.unwrap();
        // What has been read since is not unread.
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
        host.write_all(b"for nobody").await.unwrap();
        pump.await.unwrap();
        // Even if the host says that it has sent more.
        assert_eq!(stdin.unread(1000).await.unwrap(), b"");
    }
}
