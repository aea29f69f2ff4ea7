//! Input from the caller to the guest.

use std::{io, sync::Mutex};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    task::JoinHandle,
};

use super::{BUFFER, fifo::Stdin};

/// The caller's stdin on its way to the guest.
#[derive(Debug)]
pub struct Input {
    keeper: Mutex<Option<pipe::Sender>>,
    task: JoinHandle<()>,
}

impl Input {
    /// Starts to copy; `ended` is called with the number of bytes when the caller has sent its last one.
    pub fn start<F>(
        stdin: Stdin,
        to_guest: impl AsyncWrite + Unpin + Send + 'static,
        ended: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Stdin { reader, keeper } = stdin;
        let task = tokio::spawn(async move {
            let mut to_guest = to_guest;
            let mut reader = reader;
            match copy_input(&mut reader, &mut to_guest).await {
                Ok(total) => ended(total).await,
                // The process or its VM has ended; whoever waits for it says so.
                Err(error) => tracing::debug!("stdin ends early: {error}"),
            }
            // The guest reads the stream to the count it was told; the connection lives until the process is gone.
            std::future::pending::<()>().await;
        });
        Self { keeper: Mutex::new(Some(keeper)), task }
    }

    /// The caller will write no more: stdin ends when everything in the fifo has been read.
    pub fn close(&self) {
        self.keeper.lock().expect("no panic while held").take();
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_input(
    from: &mut (impl AsyncRead + Unpin),
    to_guest: &mut (impl AsyncWrite + Unpin),
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(copied);
        }
        to_guest.write_all(&buffer[..read]).await?;
        to_guest.flush().await?;
        copied += read as u64;
    }
}
