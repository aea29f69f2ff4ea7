//! Input from the caller to the guest.

use std::{
    io,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::OwnedMutexGuard,
    task::JoinHandle,
};

use super::{BUFFER, fifo::Stdin};

/// The caller's stdin on its way to the guest.
#[derive(Debug)]
pub struct Input {
    keeper: Mutex<Option<pipe::Sender>>,
    task: JoinHandle<()>,
    taken: Taken,
}

/// Bytes that were taken from the caller and go to the guest, whether they are there yet or not. Locked while some are taken.
type Taken = Arc<tokio::sync::Mutex<u64>>;

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
        let taken = Taken::default();
        let counted = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            let mut to_guest = to_guest;
            match copy_input(&reader, &mut to_guest, &counted).await {
                Ok(total) => ended(total).await,
                // The process or its VM has ended; whoever waits for it says so.
                Err(error) => tracing::debug!("stdin ends early: {error}"),
            }
            // The guest reads the stream to the count it was told; the connection lives until the process is gone.
            std::future::pending::<()>().await;
        });
        Self { keeper: Mutex::new(Some(keeper)), task, taken }
    }

    /// How many bytes were taken from the caller. No more are until this is dropped; what it writes meanwhile waits in its
    /// fifo.
    pub async fn hold(&self) -> OwnedMutexGuard<u64> {
        Arc::clone(&self.taken).lock_owned().await
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
    from: &pipe::Receiver,
    to_guest: &mut (impl AsyncWrite + Unpin),
    taken: &Taken,
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = take(from, taken, &mut buffer).await?;
        if read == 0 {
            return Ok(*taken.lock().await);
        }
        to_guest.write_all(&buffer[..read]).await?;
        to_guest.flush().await?;
    }
}

/// Reads and counts what is there, unless that is held. Nothing is lost if this is cancelled.
async fn take(from: &pipe::Receiver, taken: &Taken, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        let mut taken = taken.lock().await;
        match from.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => {
                let read = read?;
                *taken += read as u64;
                return Ok(read);
            }
        }
    }
}
