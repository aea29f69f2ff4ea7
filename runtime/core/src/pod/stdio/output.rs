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

/// How long all of the output may take after the end of its process, whether the guest or the reader is slow.
const DELIVERY: Duration = Duration::from_secs(60);

/// One output stream on its way from the guest to the caller.
#[derive(Debug)]
pub struct OutputCopy {
    name: &'static str,
    orders: watch::Sender<OutputOrders>,
    copied: JoinHandle<io::Result<u64>>,
    unread: Option<Unread>,
}

/// What is known about the end of an output.
#[derive(Debug, Clone, Copy, Default)]
struct OutputOrders {
    /// The number of bytes, which is known when the process has ended.
    total: Option<u64>,
    /// The bytes are read from the guest and dropped.
    discard: bool,
}

/// Makes outputs be dropped instead of being delivered.
#[derive(Debug)]
pub struct DiscardOutput(Vec<watch::Sender<OutputOrders>>);

impl DiscardOutput {
    /// Drops all bytes from now on, including those whose reader is being waited for.
    pub fn now(&self) {
        self.0.iter().for_each(|orders| orders.send_modify(|orders| orders.discard = true));
    }
}

impl FromIterator<Self> for DiscardOutput {
    fn from_iter<I: IntoIterator<Item = Self>>(outputs: I) -> Self {
        Self(outputs.into_iter().flat_map(|output| output.0).collect())
    }
}

impl OutputCopy {
    /// Starts to copy from the guest to the caller.
    pub fn start(
        name: &'static str,
        from_guest: impl AsyncRead + Unpin + Send + 'static,
        sink: impl AsyncWrite + Unpin + Send + 'static,
    ) -> Self {
        let (orders, seen) = watch::channel(OutputOrders::default());
        Self { name, orders, copied: tokio::spawn(copy_output(from_guest, sink, seen)), unread: None }
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

    /// Drops this output when it is asked to.
    pub fn discard(&self) -> DiscardOutput {
        DiscardOutput(vec![self.orders.clone()])
    }

    /// Waits until all `total` bytes of the process have reached the caller.
    ///
    /// # Errors
    /// A sentence for the log, if some bytes did not arrive.
    pub async fn finish(mut self, total: u64) -> Result<(), String> {
        self.orders.send_modify(|orders| orders.total = Some(total));
        let Ok(copied) = timeout(DELIVERY, &mut self.copied).await else {
            self.copied.abort();
            return Err(format!("{} was not complete {DELIVERY:?} after its process had ended", self.name));
        };
        match copied {
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
    pub async fn abandon(mut self) {
        // The stream ends with its VM. The deadline is for a stream that does not end.
        if timeout(READER_GRACE, &mut self.copied).await.is_err() {
            self.copied.abort();
            tracing::warn!(stream = self.name, "output dropped: its reader accepts nothing");
        }
    }
}

async fn copy_output(
    mut from_guest: impl AsyncRead + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    mut orders: watch::Receiver<OutputOrders>,
) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let (mut copied, mut dropped) = (0, 0);
    loop {
        let OutputOrders { total, .. } = *orders.borrow();
        if total.is_some_and(|total| copied >= total) {
            break;
        }
        let read = tokio::select! {
            read = from_guest.read(&mut buffer) => read?,
            changed = orders.changed() => match changed {
                Ok(()) => continue,
                // The copy was abandoned: it ends with the stream.
                Err(_) => from_guest.read(&mut buffer).await?,
            },
            () = sleep(GUEST_GRACE), if total.is_some() => {
                let problem = format!("only {copied} bytes came from the guest");
                return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
            }
        };
        if read == 0 {
            break;
        }
        copied += read as u64;
        if dropped > 0 || !put(&mut sink, &buffer[..read], &mut orders).await? {
            dropped += read as u64;
        }
    }
    if dropped > 0 {
        let problem =
            format!("its container was killed and its reader accepts nothing, {dropped} bytes were dropped");
        return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
    }
    // A tokio file buffers bytes before it writes them.
    sink.flush().await?;
    Ok(copied)
}

/// Writes all of `bytes`; false if they were dropped instead. Once the process has ended, the reader must
/// accept them within the grace period.
async fn put(
    sink: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    orders: &mut watch::Receiver<OutputOrders>,
) -> io::Result<bool> {
    let mut write = pin!(sink.write_all(bytes));
    let mut ended = orders.clone();
    let written = async {
        tokio::select! {
            written = &mut write => return written,
            _ = ended.wait_for(|orders| orders.total.is_some()) => {}
        }
        timeout(READER_GRACE, write).await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "its reader accepts nothing, the rest was dropped"))
        })
    };
    tokio::select! {
        biased;
        written = written => written.map(|()| true),
        true = async { orders.wait_for(|orders| orders.discard).await.is_ok() } => Ok(false),
    }
}
