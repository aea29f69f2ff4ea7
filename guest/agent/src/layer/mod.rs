//! Sends a container's changes to its root file system to the host.
//!
//! ```text
//!   upper directory ──> pack (a separate thread) ──bounded──> raw stream ──> host
//! ```
//! The upper directory is read directly, not through the overlay: it holds exactly what the container wrote.
//! Reading files blocks, and the agent's only thread must serve calls meanwhile, so a separate thread reads.

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

pub(crate) use pack::{PackError, pack};
pub(crate) use stamp::Stamp;

/// Size of a chunk, bytes.
const CHUNK: usize = 64 << 10;
/// Chunks that may wait for the stream; the thread blocks when there are more.
const WAITING: usize = 4;

#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error("the host does not take the archive any more")]
    Stream(#[source] io::Error),
    #[error("the archive's thread has failed")]
    Thread(#[source] tokio::task::JoinError),
}

/// Sends the archive of `upper` and returns its length in bytes. The stream stays open until the host closes
/// it, so that no byte is lost.
///
/// # Errors
/// A file cannot be read or archived, or the host goes away.
pub(crate) async fn export(upper: PathBuf, mut stream: Stream) -> Result<u64, LayerError> {
    let (sender, mut chunks) = mpsc::channel::<Vec<u8>>(WAITING);
    let packed = spawn_blocking(move || {
        let mut output = Chunks { sender, chunk: Vec::with_capacity(CHUNK) };
        pack(&upper, &mut output)
    });
    let mut total = 0;
    while let Some(chunk) = chunks.recv().await {
        // After an error the thread's channel is closed, which ends the thread.
        stream.write_all(&chunk).await.map_err(LayerError::Stream)?;
        total += chunk.len() as u64;
    }
    packed.await.map_err(LayerError::Thread)??;
    stream.flush().await.map_err(LayerError::Stream)?;
    tokio::spawn(async move {
        // The host sends nothing: this returns when the host has closed its end.
        let _ = stream.read_u8().await;
    });
    Ok(total)
}

/// Passes the written bytes on to the runtime's thread.
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
