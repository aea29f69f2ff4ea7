//! What a container has changed in its root file system, on its way to the host.
//!
//! ```text
//!   upper directory ──> pack (a thread of its own) ──bounded──> raw stream ──> host
//! ```
//! The overlay's upper directory is read below the overlay: what the container wrote and nothing else. The agent has one
//! thread, which must answer meanwhile, and reading files blocks.

mod pack;
mod stamp;

use std::{
    io::{self, Write},
    path::PathBuf,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    task::spawn_blocking,
};

use crate::channel::Stream;

pub(crate) use pack::PackError;
pub(crate) use stamp::Stamp;

/// Bytes that are handed over at once.
const CHUNK: usize = 64 << 10;
/// Chunks that wait for the stream; the thread waits when there are more.
const WAITING: usize = 4;

#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error("the host has stopped to take the archive")]
    Stream(#[source] io::Error),
    #[error("the archive's thread has failed")]
    Thread(#[source] tokio::task::JoinError),
}

/// Sends the archive of `upper` and returns how many bytes it has. The stream stays open until the host closes it, so
/// that nothing of what it carries is lost.
///
/// # Errors
/// A file cannot be read or archived, or the host goes away.
pub(crate) async fn export(upper: PathBuf, mut stream: Stream) -> Result<u64, LayerError> {
    let (sender, mut chunks) = mpsc::channel::<Vec<u8>>(WAITING);
    let packed = spawn_blocking(move || {
        let mut output = Chunks { sender, chunk: Vec::with_capacity(CHUNK) };
        pack::pack(&upper, &mut output)
    });
    let mut total = 0;
    while let Some(chunk) = chunks.recv().await {
        // The thread finds nobody to give its chunks to then, and ends.
        stream.write_all(&chunk).await.map_err(LayerError::Stream)?;
        total += chunk.len() as u64;
    }
    packed.await.map_err(LayerError::Thread)??;
    stream.flush().await.map_err(LayerError::Stream)?;
    tokio::spawn(async move {
        // The host sends nothing: this ends when it has closed its end.
        let _ = stream.read_u8().await;
    });
    Ok(total)
}

/// Passes what is written on to the thread of the runtime.
struct Chunks {
    sender: mpsc::Sender<Vec<u8>>,
    chunk: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        self.sender.blocking_send(chunk).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
