//! Passes the archive from the guest to the thread that applies it, since file operations block. The guest
//! has to send at a least rate, and an export has a total time, so that a guest cannot prolong one.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    pin::pin,
    time::Duration,
};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_storage::{
    container_disk::ContainerDisk,
    layer::{AppliedLayer, LayerError, LayerLimits, PreviousLayer},
};
use machinen_vm::{
    Vm, VmError,
    agent::{self, AgentError},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// Chunks that wait to be applied; the guest waits when there are more.
const WAITING: usize = 4;
/// How long the host waits for the guest in all, in addition to what the bytes that have arrived allow.
const HEAD_START: Duration = Duration::from_secs(60);
/// Bytes a second that the guest has to send while the host waits for it. An emulated CPU that packs small
/// files is several times faster.
const LEAST_RATE: u64 = 256 << 10;

/// Why a container's changes did not reach the host.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The changes are not valid, or cannot be written.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The stream to the guest cannot be opened.
    #[error("cannot open a stream for the archive")]
    Stream(#[source] VmError),
    /// The guest's agent refused the export.
    #[error("the guest cannot export its changes")]
    Agent(#[source] AgentError),
    /// The stream failed.
    #[error("the stream of the archive broke after {arrived} bytes")]
    Broken {
        /// Number of bytes that arrived.
        arrived: u64,
        /// The cause.
        source: io::Error,
    },
    /// The stream ended early.
    #[error("the stream of the archive ended after {arrived} bytes")]
    Ended {
        /// Number of bytes that arrived.
        arrived: u64,
    },
    /// More bytes arrived than the agent has reported.
    #[error("the guest sent {arrived} bytes of an archive of {total}")]
    TooMuch {
        /// Number of bytes that arrived.
        arrived: u64,
        /// Number of bytes that were announced.
        total: u64,
    },
    /// The guest sends too slowly.
    #[error(
        "the guest sent {arrived} bytes of an archive while the host waited {} s for it, which is too slow",
        waited.as_secs()
    )]
    Slow {
        /// Number of bytes that arrived.
        arrived: u64,
        /// The time for which the host has waited for the guest.
        waited: Duration,
    },
    /// The export took too long.
    #[error(
        "the archive was not complete after {} s; raise rootdisk.export_timeout_s in the configuration if the \
         container really has so much to export",
        limit.as_secs()
    )]
    Deadline {
        /// The limit of the configuration (`rootdisk.export_timeout_s`).
        limit: Duration,
    },
    /// The container was sent SIGKILL meanwhile.
    #[error("the container was killed meanwhile")]
    Killed,
    /// The thread that applies the changes ended without a result.
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

impl HasKind for ReceiveError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Layer(source) => source.kind(),
            Self::Stream(source) => source.kind(),
            Self::Agent(source) => source.kind(),
            Self::TooMuch { .. } | Self::Killed => ErrorKind::FailedPrecondition,
            Self::Broken { .. } | Self::Ended { .. } => ErrorKind::Unavailable,
            Self::Slow { .. } | Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Worker(_) => ErrorKind::Internal,
        }
    }
}

/// The limits of one export.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExportLimits {
    /// What the archive may make on the host.
    pub(super) layer: LayerLimits,
    /// How long the archive may take to arrive.
    pub(super) time: Duration,
}

/// Asks the guest for a container's changes and stores them in the target of the disk, see [`ContainerDisk::export`]. The container must have ended, or
/// its processes must be frozen. The export fails when `killed` resolves.
///
/// # Errors
/// The guest cannot send the changes, sends something else or too slowly, or the host cannot store them. Then
/// the old layer is still in place, and nothing of the new one is left.
pub(super) async fn receive(
    vm: &Vm,
    agent: &agent::Client,
    container: &str,
    (disk, before): (ContainerDisk, Option<OwnedFd>),
    limits: ExportLimits,
    killed: impl Future<Output = ()>,
) -> Result<Option<(AppliedLayer, PreviousLayer)>, ReceiveError> {
    let (token, stream) = vm.open_stream().await.map_err(ReceiveError::Stream)?;
    let (sender, chunks) = mpsc::channel(WAITING);
    let applying = spawn_blocking(move || disk.export(ArchiveReader::new(chunks), before, limits.layer));
    let answer = async { agent.export_layer(container, token).await.map_err(ReceiveError::Agent) };
    // The sender is dropped with the future that passes the archive, which ends the applying thread.
    let passed = tokio::select! {
        biased;
        passed = pass(stream, answer, sender) => passed,
        () = sleep(limits.time) => Err(PassError::Failed(ReceiveError::Deadline { limit: limits.time })),
        () = killed => Err(PassError::Failed(ReceiveError::Killed)),
    };
    let applied = applying.await.map_err(ReceiveError::Worker)?;
    match (passed, applied) {
        (Err(PassError::Failed(error)), _) => Err(error),
        (Ok(()) | Err(PassError::Unwanted), applied) => Ok(applied?),
    }
}

/// Why not all of the archive was passed on.
enum PassError {
    Failed(ReceiveError),
    /// The thread that applies the archive has stopped, and returns the reason.
    Unwanted,
}

/// A part of the archive, or None at its end. A channel that closes without None means a failure.
type ArchivePiece = Option<Vec<u8>>;

/// Passes bytes on until there are as many as the agent's answer says.
async fn pass(
    mut stream: impl AsyncRead + Unpin,
    answer: impl Future<Output = Result<u64, ReceiveError>>,
    pieces: mpsc::Sender<ArchivePiece>,
) -> Result<(), PassError> {
    let mut answer = pin!(answer);
    let mut waited = Duration::ZERO;
    let (mut total, mut arrived) = (None, 0_u64);
    let mut buffer = vec![0; CHUNK];
    loop {
        match total {
            Some(total) if arrived == total => {
                return pieces.send(None).await.map_err(|_| PassError::Unwanted);
            }
            Some(total) if arrived > total => {
                return Err(PassError::Failed(ReceiveError::TooMuch { arrived, total }));
            }
            _ => {}
        }
        let allowed = HEAD_START + Duration::from_secs(arrived / LEAST_RATE);
        let since = Instant::now();
        let slow = |_| PassError::Failed(ReceiveError::Slow { arrived, waited: allowed });
        let read = tokio::select! {
            answered = &mut answer, if total.is_none() => {
                total = Some(answered.map_err(PassError::Failed)?);
                waited += since.elapsed();
                continue;
            }
            read = timeout(allowed.saturating_sub(waited), stream.read(&mut buffer)) => read.map_err(slow)?,
        };
        waited += since.elapsed();
        match read {
            Ok(0) => {
                // If the agent has answered with an error, that is more precise.
                if total.is_none() {
                    let answered = timeout(allowed.saturating_sub(waited), answer).await.map_err(slow)?;
                    answered.map_err(PassError::Failed)?;
                }
                return Err(PassError::Failed(ReceiveError::Ended { arrived }));
            }
            Ok(read) => {
                arrived += read as u64;
                pieces.send(Some(buffer[..read].to_vec())).await.map_err(|_| PassError::Unwanted)?;
            }
            Err(source) => return Err(PassError::Failed(ReceiveError::Broken { arrived, source })),
        }
    }
}

/// The archive as the applying thread reads it. Its end is reported only if all bytes have arrived.
struct ArchiveReader {
    pieces: mpsc::Receiver<ArchivePiece>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl ArchiveReader {
    fn new(pieces: mpsc::Receiver<ArchivePiece>) -> Self {
        Self { pieces, current: Vec::new(), at: 0, ended: false }
    }
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => (self.current, self.at) = (piece, 0),
                Some(None) => self.ended = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let read = buffer.len().min(self.current.len() - self.at);
        buffer[..read].copy_from_slice(&self.current[self.at..self.at + read]);
        self.at += read;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// What arrives of `bytes` when the agent answers `answer`.
    async fn passed(
        bytes: &[u8],
        answer: Result<u64, ReceiveError>,
        closed: bool,
    ) -> (Result<(), PassError>, io::Result<Vec<u8>>) {
        let (mut guest, host) = tokio::io::duplex(16);
        let (sender, pieces) = mpsc::channel(1);
        let reader = spawn_blocking(move || {
            let mut all = Vec::new();
            ArchiveReader::new(pieces).read_to_end(&mut all).map(|_| all)
        });
        let (answered, wait) = tokio::sync::oneshot::channel();
        let send = async {
            guest.write_all(bytes).await.unwrap();
            let kept = if closed {
                drop(guest);
                None
            } else {
                Some(guest)
            };
            answered.send(answer).ok();
            kept
        };
        let (_kept, passed) = tokio::join!(send, pass(host, async { wait.await.unwrap() }, sender));
        (passed, reader.await.unwrap())
    }

    #[tokio::test]
    async fn the_count_marks_the_end_of_the_archive() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        // The stream stays open, and the answer comes before or after the last bytes.
        let (passed, read) = passed(&bytes, Ok(100_000), false).await;
        assert!(passed.is_ok() && read.unwrap() == bytes);
    }

    #[tokio::test]
    async fn a_closed_stream_is_not_the_end_of_the_archive() {
        let (outcome, read) = passed(b"half", Ok(8), true).await;
        assert!(matches!(outcome, Err(PassError::Failed(ReceiveError::Ended { arrived: 4 }))));
        assert!(read.is_err());
        let (outcome, read) = passed(b"twice", Ok(3), false).await;
        assert!(matches!(outcome, Err(PassError::Failed(ReceiveError::TooMuch { arrived: 5, total: 3 }))));
        assert!(read.is_err());
    }

    /// A guest that sends `chunk` bytes each second, and never answers; returns the time until it is given up.
    async fn given_up(chunk: usize) -> (Duration, PassError) {
        let (mut guest, host) = tokio::io::duplex(1 << 20);
        let (sender, mut pieces) = mpsc::channel(1);
        let drip = async {
            while guest.write_all(&vec![0; chunk]).await.is_ok() {
                sleep(Duration::from_secs(1)).await;
            }
        };
        let drain = async { while pieces.recv().await.is_some() {} };
        let start = Instant::now();
        let passed = tokio::select! {
            passed = pass(host, std::future::pending(), sender) => passed,
            _ = async { tokio::join!(drip, drain) } => unreachable!("the host reads until it gives up"),
            () = sleep(Duration::from_secs(3600)) => Ok(()),
        };
        (start.elapsed(), passed.expect_err("nothing was complete"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_drips_is_given_up() {
        let (after, error) = given_up(1).await;
        assert!(matches!(error, PassError::Failed(ReceiveError::Slow { .. })));
        assert_eq!(after.as_secs(), HEAD_START.as_secs());
        // Half of the least rate, which the head start lets last for twice its time.
        let (after, error) = given_up(LEAST_RATE as usize / 2).await;
        assert!(matches!(error, PassError::Failed(ReceiveError::Slow { .. })));
        assert!((115..=125).contains(&after.as_secs()), "{after:?}");
    }

    #[tokio::test]
    async fn the_error_of_the_agent_is_kept() {
        let refused = ReceiveError::Agent(AgentError::Closed);
        let (outcome, read) = passed(b"some", Err(refused), true).await;
        assert!(matches!(outcome, Err(PassError::Failed(ReceiveError::Agent(_)))));
        assert!(read.is_err());
    }
}
