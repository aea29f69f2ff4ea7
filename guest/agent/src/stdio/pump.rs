//! What moves bytes between a process and the host, one buffer at a time.

use std::{
    io,
    os::fd::AsFd,
    sync::{Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
};

use super::{terminal::Master, unread::Waiting};
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
    /// Writes some of what waits. At no time is a byte in both, or in neither, when something else runs.
    pub(super) async fn write_some(&self, waiting: &Mutex<Waiting>) -> io::Result<()> {
        let write = |write: &dyn Fn(&[u8]) -> io::Result<usize>| {
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let written = write(waiting.bytes())?;
            waiting.advance(written);
            io::Result::Ok(())
        };
        match self {
            Self::Pipe(pipe) => loop {
                pipe.writable().await?;
                match write(&|bytes| pipe.try_write(bytes)) {
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                    written => return written,
                }
            },
            Self::Terminal(master) => master.write_some(write).await,
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
