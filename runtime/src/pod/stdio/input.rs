//! Input from the caller to the guest.

use std::{io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::{OwnedMutexGuard, watch},
    task::JoinHandle,
    time::sleep,
};

use super::{BUFFER, fifo::Stdin};

/// How long after the start of a process a client may take to open the process's stdin. A client that has anything to
/// write is waiting in open(2) by then; one whose input was empty may have come and gone without a word.
const CLIENT_GRACE: Duration = Duration::from_secs(1);

/// What ends an input.
#[derive(Debug)]
pub struct InputEnd {
    /// Becomes true when the caller has closed stdin (CloseIO): the input ends when everything in the fifo has been read.
    pub closed: watch::Receiver<bool>,
    /// A terminal stays open for clients to come; a pipe that no client has opened has ended.
    pub terminal: bool,
}

/// The caller's stdin on its way to the guest.
#[derive(Debug)]
pub struct Input {
    task: JoinHandle<()>,
    taken: Taken,
}

/// Bytes that were taken from the caller and go to the guest, whether they are there yet or not. Locked while some are taken.
type Taken = Arc<tokio::sync::Mutex<u64>>;

impl Input {
    /// Starts to copy; `ended` is called with the number of bytes when the caller has sent its last one.
    pub fn start<F>(
        stdin: Stdin,
        end: InputEnd,
        to_guest: impl AsyncWrite + Unpin + Send + 'static,
        ended: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let taken = Taken::default();
        let counted = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            let mut to_guest = to_guest;
            match copy_input(stdin, end, &mut to_guest, &counted).await {
                Ok(total) => ended(total).await,
                // The process or its VM has ended, which is reported by the wait for the process.
                Err(error) => tracing::debug!("stdin ends early: {error}"),
            }
            // The guest reads the stream to the count that it was given; the connection lives until the process is gone.
            std::future::pending::<()>().await;
        });
        Self { task, taken }
    }

    /// How many bytes were taken from the caller. No more are taken until the guard is dropped; what the caller writes
    /// meanwhile waits in the fifo.
    pub fn hold(&self) -> impl Future<Output = OwnedMutexGuard<u64>> + use<> {
        Arc::clone(&self.taken).lock_owned()
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_input(
    mut stdin: Stdin,
    end: InputEnd,
    to_guest: &mut (impl AsyncWrite + Unpin),
    taken: &Taken,
) -> io::Result<u64> {
    let InputEnd { mut closed, terminal } = end;
    let mut grace = pin!(sleep(CLIENT_GRACE));
    let mut unclaimed = !terminal;
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = tokio::select! {
            biased;
            // A process that is gone needs no more input either.
            _ = closed.wait_for(|closed| *closed), if stdin.is_kept() => {
                stdin.release();
                continue;
            }
            read = take(&stdin.reader, taken, &mut buffer) => read?,
            () = &mut grace, if unclaimed => {
                unclaimed = false;
                match stdin.is_abandoned()? {
                    true => 0,
                    false => continue,
                }
            }
        };
        unclaimed = false;
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
