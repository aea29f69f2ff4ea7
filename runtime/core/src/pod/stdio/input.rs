//! Input from the caller to the guest.

use std::{io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedMutexGuard, watch},
    task::JoinHandle,
    time::sleep,
};

use super::{BUFFER, StdinReader};

/// How long a client may take to open stdin after the start of a process. A client with input is waiting in
/// open(2) by then; a client whose input was empty may have opened and closed the fifo without a trace.
const CLIENT_GRACE: Duration = Duration::from_secs(1);

/// The conditions that end an input.
#[derive(Debug)]
pub struct StdinEnd {
    /// Becomes true when the caller has closed stdin (CloseIO). The input ends when the data in the fifo has
    /// been read.
    pub closed: watch::Receiver<bool>,
    /// A terminal waits for clients without a limit; a pipe that no client opens ends.
    pub terminal: bool,
}

/// The caller's stdin on its way to the guest.
#[derive(Debug)]
pub struct StdinCopy {
    task: JoinHandle<()>,
    taken: TakenBytes,
}

/// Number of bytes that were taken from the caller, including those that are still on their way to the guest.
/// Locked while bytes are taken.
type TakenBytes = Arc<tokio::sync::Mutex<u64>>;

impl StdinCopy {
    /// Starts to copy. `ended` is called with the number of bytes when the caller's input has ended. A guest
    /// that sends anything on the stream ends it: the host would have to keep data that nothing reads.
    pub fn start<F>(
        stdin: StdinReader,
        end: StdinEnd,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        to_guest: impl AsyncWrite + Unpin + Send + 'static,
        ended: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let taken = TakenBytes::default();
        let counted = Arc::clone(&taken);
        let task = tokio::spawn(async move {
            let mut to_guest = to_guest;
            let copy = async {
                match copy_input(stdin, end, &mut to_guest, &counted).await {
                    Ok(total) => ended(total).await,
                    // The process or its VM has ended, which the wait for the process reports.
                    Err(error) => tracing::debug!("stdin ends early: {error}"),
                }
                // The guest reads the stream up to the reported count, so the connection stays open until the
                // process is removed.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = copy => {}
                () = misuse(from_guest) => tracing::warn!("stdin ends: the guest sends data on it"),
            }
        });
        Self { task, taken }
    }

    /// Returns how many bytes were taken from the caller. No more are taken until the guard is dropped;
    /// further input waits in the fifo.
    pub fn hold(&self) -> impl Future<Output = OwnedMutexGuard<u64>> + use<> {
        Arc::clone(&self.taken).lock_owned()
    }
}

impl Drop for StdinCopy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Resolves when the guest has sent data on a stream that carries only input.
async fn misuse(mut from_guest: impl AsyncRead + Unpin) {
    if !matches!(from_guest.read(&mut [0]).await, Ok(1)) {
        // The stream has ended, which the copy notices when it writes.
        std::future::pending::<()>().await;
    }
}

async fn copy_input(
    mut stdin: StdinReader,
    end: StdinEnd,
    to_guest: &mut (impl AsyncWrite + Unpin),
    taken: &TakenBytes,
) -> io::Result<u64> {
    let StdinEnd { mut closed, terminal } = end;
    let mut grace = pin!(sleep(CLIENT_GRACE));
    let mut unclaimed = !terminal && stdin.has_clients();
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = tokio::select! {
            biased;
            // When the sender has been dropped, the process is removed and needs no more input.
            _ = closed.wait_for(|closed| *closed), if stdin.is_kept() => {
                stdin.release();
                continue;
            }
            read = take(&mut stdin, taken, &mut buffer) => read?,
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

/// Reads and counts available bytes, once the count is not held. Cancelling this loses nothing.
async fn take(from: &mut StdinReader, taken: &TakenBytes, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        from.readable().await?;
        let mut taken = taken.lock().await;
        match from.read_now(buffer).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => {
                let read = read?;
                *taken += read as u64;
                return Ok(read);
            }
        }
    }
}
