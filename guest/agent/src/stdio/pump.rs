//! What moves bytes between a process and the host, one buffer at a time.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
};

use super::terminal::Master;
use crate::channel::Stream;

/// As large as a process's pipes: what it writes at full speed is moved in few steps.
pub(super) const BUFFER: usize = 256 << 10;

/// Where a process's output comes from.
#[derive(Debug)]
pub(crate) enum Source {
    Pipe(pipe::Receiver),
    Terminal(Master),
}

/// Where a process's input goes.
#[derive(Debug)]
pub(crate) enum Sink {
    Pipe(pipe::Sender),
    Terminal(Master),
}

impl Source {
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Terminal(master) => master.read(buffer).await,
        }
    }

    /// Asks the kernel itself: the runtime may not have heard yet of what came just before the end.
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let fd = match self {
            Self::Pipe(pipe) => pipe.as_fd(),
            Self::Terminal(master) => master.as_fd(),
        };
        nix::unistd::read(fd, buffer).map_err(Into::into)
    }
}

impl Sink {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::Terminal(master) => master.write_all(bytes).await,
        }
    }
}

/// Moves a process's output to the host until the process closes it, or, after `ended` is true, until nothing is
/// left in the pipe or terminal: something that outlives the process may hold its end for ever.
///
/// Returns how many bytes the stream took, and the stream, which must stay open. Without one, output is discarded.
pub(crate) async fn pump_out(
    mut source: Source,
    mut stream: Option<Stream>,
    mut ended: watch::Receiver<bool>,
) -> (u64, Option<Stream>) {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let read = tokio::select! {
            biased;
            read = source.read(&mut buffer) => read,
            _ = ended.wait_for(|ended| *ended) => source.read_now(&mut buffer),
        };
        let Ok(length @ 1..) = read else { break };
        let Some(stream) = &mut stream else { continue };
        // A host that has gone away closes the pipe, and the process finds out as it would at a shell.
        if stream.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        total += length as u64;
    }
    if let Some(stream) = &mut stream {
        // The count below is only as good as the bytes before it.
        let _ = stream.flush().await;
    }
    (total, stream)
}

/// How much of stdin has been taken from the host, and how much there will be.
#[derive(Debug, Clone)]
pub(crate) struct StdinProgress {
    taken: Arc<AtomicU64>,
    total: watch::Sender<Option<u64>>,
}

impl StdinProgress {
    pub(crate) fn new() -> Self {
        Self { taken: Arc::default(), total: watch::Sender::new(None) }
    }

    /// The host has sent its last byte. False when more than `total` bytes have been read already.
    pub(crate) fn end_at(&self, total: u64) -> bool {
        if self.taken.load(Ordering::Relaxed) > total {
            return false;
        }
        self.total.send_replace(Some(total));
        true
    }
}

/// Moves the host's bytes to a process until the announced end, or until either side has closed.
pub(crate) async fn pump_in(mut stream: Stream, mut sink: Sink, progress: StdinProgress) {
    let mut total = progress.total.subscribe();
    let mut buffer = vec![0; BUFFER];
    loop {
        let taken = progress.taken.load(Ordering::Relaxed);
        let left = match *total.borrow_and_update() {
            None => BUFFER,
            Some(total) => usize::try_from(total.saturating_sub(taken)).unwrap_or(BUFFER).min(BUFFER),
        };
        if left == 0 {
            return;
        }
        let length = tokio::select! {
            read = stream.read(&mut buffer[..left]) => match read {
                Ok(length @ 1..) => length,
                _ => return,
            },
            changed = total.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        progress.taken.fetch_add(length as u64, Ordering::Relaxed);
        if sink.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
