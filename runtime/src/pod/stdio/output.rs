//! Output from the guest to the caller: complete when as many bytes have arrived as the guest says there were.

use std::{io, pin::pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{BUFFER, Sink, unread::Unread};

/// How long a reader may take nothing of the output of a process that has ended before the rest is dropped.
const READER_GRACE: Duration = Duration::from_secs(10);

/// How long nothing may come of what a process that has ended is said to have written. Its guest is not believed for
/// ever, or a container could be kept from ending.
const GUEST_GRACE: Duration = Duration::from_secs(10);

/// One output stream on its way from the guest to the caller.
#[derive(Debug)]
pub struct Output {
    name: &'static str,
    total: watch::Sender<Option<u64>>,
    copied: JoinHandle<io::Result<u64>>,
    unread: Option<Unread>,
}

impl Output {
    /// Starts to copy from the guest to the caller.
    pub fn start(
        name: &'static str,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        sink: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (total, seen) = watch::channel(None);
        Self { name, total, copied: tokio::spawn(copy_output(from_guest, sink, seen)), unread: None }
    }

    /// The same to what a caller has named; if that is a fifo, its reader is waited for in the end.
    pub fn to(name: &'static str, from_guest: impl AsyncRead + Unpin + Send + 'static, sink: Sink) -> Self {
        let unread = match &sink {
            Sink::Pipe(fifo) => Unread::of(fifo),
            Sink::File(_) => None,
        };
        Self { unread, ..Self::start(name, from_guest, sink) }
    }

    /// Waits until the `total` bytes that the process wrote have reached the caller.
    ///
    /// # Errors
    /// A sentence for the log when they did not all arrive.
    pub async fn finish(self, total: u64) -> Result<(), String> {
        self.total.send_replace(Some(total));
        match self.copied.await {
            Ok(Ok(copied)) if copied == total => {
                if let Some(unread) = self.unread {
                    unread.read().await;
                }
                Ok(())
            }
            Ok(Ok(copied)) => Err(format!("{} lost bytes: {copied} of {total} arrived", self.name)),
            Ok(Err(error)) => Err(format!("{} could not be delivered: {error}", self.name)),
            Err(error) => Err(format!("{} could not be delivered: {error}", self.name)),
        }
    }

    /// Delivers what has arrived when the guest is gone and nobody can say how much there was.
    pub async fn abandon(self) {
        // The stream ends with its VM; the deadline is for one that does not.
        if timeout(READER_GRACE, self.copied).await.is_err() {
            tracing::warn!(stream = self.name, "output dropped: its reader takes nothing");
        }
    }
}

async fn copy_output(
    mut from_guest: impl AsyncRead + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    mut total: watch::Receiver<Option<u64>>,
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0;
    loop {
        if total.borrow().is_some_and(|total| copied >= total) {
            break;
        }
        let read = tokio::select! {
            read = from_guest.read(&mut buffer) => read?,
            changed = total.changed() => match changed {
                Ok(()) => continue,
                // Abandoned: the stream says when it ends.
                Err(_) => from_guest.read(&mut buffer).await?,
            },
            () = sleep(GUEST_GRACE), if total.borrow().is_some() => {
                let problem = format!("only {copied} bytes came from the guest");
                return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
            }
        };
        if read == 0 {
            break;
        }
        put(&mut sink, &buffer[..read], &mut total).await?;
        copied += read as u64;
    }
    // A file takes bytes before it has written them.
    sink.flush().await?;
    Ok(copied)
}

/// Writes all of `bytes`; once the process has ended, only as long as the reader takes something within the grace.
async fn put(
    sink: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    total: &mut watch::Receiver<Option<u64>>,
) -> io::Result<()> {
    let mut write = pin!(sink.write_all(bytes));
    tokio::select! {
        written = &mut write => return written,
        _ = total.wait_for(Option::is_some) => {}
    }
    timeout(READER_GRACE, write).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, "its reader takes nothing, the rest was dropped"))
    })
}
