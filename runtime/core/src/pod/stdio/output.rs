//! Output from the guest to the caller. It is complete when as many bytes have arrived as the guest reports.

use std::{io, pin::pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{BUFFER, OutputSink, unread::Unread};

/// How long the reader of an ended process's output may stall before the rest is dropped.
const READER_GRACE: Duration = Duration::from_secs(10);

/// How long the guest may stall before the output of an ended process is given up. Without this limit a guest
/// could keep a container from ending.
const GUEST_GRACE: Duration = Duration::from_secs(10);

/// One output stream on its way from the guest to the caller.
#[derive(Debug)]
pub struct OutputCopy {
    name: &'static str,
    total: watch::Sender<Option<u64>>,
    copied: JoinHandle<io::Result<u64>>,
    unread: Option<Unread>,
}

impl OutputCopy {
    /// Starts to copy from the guest to the caller.
    pub fn start(
        name: &'static str,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        sink: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (total, seen) = watch::channel(None);
        Self { name, total, copied: tokio::spawn(copy_output(from_guest, sink, seen)), unread: None }
    }

    /// Like [`OutputCopy::start`], for a stream that the caller has named. If that is a fifo, its reader is
    /// waited for at the end.
    pub fn to(
        name: &'static str,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        sink: OutputSink,
    ) -> Self {
        let unread = match &sink {
            OutputSink::Pipe(fifo) => Unread::of(fifo),
            OutputSink::File(_) | OutputSink::Inherited(_) => None,
        };
        Self { unread, ..Self::start(name, from_guest, sink) }
    }

    /// Waits until all `total` bytes of the process have reached the caller.
    ///
    /// # Errors
    /// A sentence for the log, if some bytes did not arrive.
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

    /// Delivers the bytes that have arrived from a guest that has ended, when the total is unknown.
    pub async fn abandon(self) {
        // The stream ends with its VM. The deadline is for a stream that does not end.
        if timeout(READER_GRACE, self.copied).await.is_err() {
            tracing::warn!(stream = self.name, "output dropped: its reader accepts nothing");
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
                // The copy was abandoned: it ends with the stream.
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
    // A tokio file buffers bytes before it writes them.
    sink.flush().await?;
    Ok(copied)
}

/// Writes all of `bytes`. Once the process has ended, the reader must accept them within the grace period.
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
        Err(io::Error::new(io::ErrorKind::TimedOut, "its reader accepts nothing, the rest was dropped"))
    })
}
