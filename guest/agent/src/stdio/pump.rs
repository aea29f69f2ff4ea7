//! Moves bytes between a process and the host, one buffer at a time.

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

use super::{terminal::Master, unread::Backlog};
use crate::channel::Stream;

/// As large as a process's pipes, so that few steps move what it writes at full speed.
pub(super) const BUFFER: usize = 256 << 10;

/// Where a process's output comes from.
#[derive(Debug)]
pub(crate) enum OutputSource {
    Pipe(pipe::Receiver),
    Terminal(Master),
}

/// Where a process's input goes.
#[derive(Debug)]
pub(crate) enum InputSink {
    Pipe(pipe::Sender),
    Terminal(Master),
}

impl OutputSource {
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Terminal(master) => master.read(buffer).await,
        }
    }

    /// Reads directly: the runtime may not have noticed the last bytes before the end.
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let fd = match self {
            Self::Pipe(pipe) => pipe.as_fd(),
            Self::Terminal(master) => master.as_fd(),
        };
        nix::unistd::read(fd, buffer).map_err(Into::into)
    }
}

impl InputSink {
    /// Writes some of the backlog. Whenever other tasks run, each byte is either in the backlog or in the
    /// sink.
    pub(super) async fn write_some(&self, backlog: &Mutex<Backlog>) -> io::Result<()> {
        let write = |write: &dyn Fn(&[u8]) -> io::Result<usize>| {
            let mut backlog = backlog.lock().unwrap_or_else(PoisonError::into_inner);
            let written = write(backlog.bytes())?;
            backlog.advance(written);
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

/// Moves a process's output to the host until the process closes it, or, after `ended` is true, until the
/// pipe or terminal is empty: another process may keep the other end open forever.
///
/// Returns how many bytes the stream took, and the stream, which must stay open. Without a stream, output is
/// discarded.
pub(crate) async fn pump_out(
    mut source: OutputSource,
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
        // If the host has closed the stream, the pipe is closed: the process sees that as it would in a
        // shell.
        if stream.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        total += length as u64;
    }
    if let Some(stream) = &mut stream {
        // The host relies on the count only after the bytes have arrived.
        let _ = stream.flush().await;
    }
    (total, stream)
}
