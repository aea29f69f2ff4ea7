//! A process's standard streams: pipes on its side, raw streams to the host on the other, and what pumps between.
//!
//! Each pump holds one buffer at most, so a reader that stops makes the writer stop. The end of a stream is told
//! by the control channel, never by closing: the agent keeps an output stream open until its process is deleted.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use machinen_protocol::api;
use nix::{
    fcntl::OFlag,
    unistd::{Gid, Uid, fchown, pipe2},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
};

use crate::channel::{Stream, Unclaimed};

/// As large as a pipe is by default.
const BUFFER: usize = 64 << 10;

/// The streams of one process, claimed.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// What the process itself gets as 0, 1 and 2.
#[derive(Debug)]
pub(crate) struct ProcessEnds(pub(crate) [OwnedFd; 3]);

/// What the agent keeps of them.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    pub(crate) stdin: Option<(Stream, pipe::Sender)>,
    pub(crate) stdout: Option<(pipe::Receiver, Stream)>,
    pub(crate) stderr: Option<(pipe::Receiver, Stream)>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("no stream with token {token} is waiting for {name}")]
    NoStream { name: &'static str, token: u64 },
    #[error("cannot make the process's {name}")]
    Make { name: &'static str, source: io::Error },
}

impl Streams {
    /// # Errors
    /// A token is not one of an open, unclaimed stream.
    pub(crate) async fn claim(stdio: &api::Stdio, unclaimed: &Unclaimed) -> Result<Self, StdioError> {
        let claim = async |name, token| match token {
            0 => Ok(None),
            token => unclaimed.claim(token).await.map(Some).ok_or(StdioError::NoStream { name, token }),
        };
        // All are taken even if one is missing: the host gives a token once.
        let stdin = claim("stdin", stdio.stdin).await;
        let stdout = claim("stdout", stdio.stdout).await;
        let stderr = claim("stderr", stdio.stderr).await;
        Ok(Self { stdin: stdin?, stdout: stdout?, stderr: stderr? })
    }

    /// Makes a pipe for every stream, and /dev/null for the others. The process's ends belong to `owner`, so that
    /// it can open /dev/stdout and its like.
    ///
    /// # Errors
    /// Those of pipe(2).
    pub(crate) fn pipes(self, owner: Uid) -> Result<(ProcessEnds, AgentEnds), StdioError> {
        let (stdin_end, stdin) = match self.stdin {
            None => (null("stdin")?, None),
            Some(stream) => {
                let (read, write) = pipe("stdin")?;
                own(&read, owner, "stdin")?;
                let write = pipe::Sender::from_owned_fd(write).map_err(failed("stdin"))?;
                (read, Some((stream, write)))
            }
        };
        let (stdout_end, stdout) = output("stdout", self.stdout, owner)?;
        let (stderr_end, stderr) = output("stderr", self.stderr, owner)?;
        Ok((ProcessEnds([stdin_end, stdout_end, stderr_end]), AgentEnds { stdin, stdout, stderr }))
    }
}

type Output = (OwnedFd, Option<(pipe::Receiver, Stream)>);

fn output(name: &'static str, stream: Option<Stream>, owner: Uid) -> Result<Output, StdioError> {
    let Some(stream) = stream else { return Ok((null(name)?, None)) };
    let (read, write) = pipe(name)?;
    own(&write, owner, name)?;
    let read = pipe::Receiver::from_owned_fd(read).map_err(failed(name))?;
    Ok((write, Some((read, stream))))
}

fn pipe(name: &'static str) -> Result<(OwnedFd, OwnedFd), StdioError> {
    pipe2(OFlag::O_CLOEXEC).map_err(|err| failed(name)(err.into()))
}

fn own(end: &OwnedFd, owner: Uid, name: &'static str) -> Result<(), StdioError> {
    fchown(end.as_fd(), Some(owner), None::<Gid>).map_err(|err| failed(name)(err.into()))
}

fn null(name: &'static str) -> Result<OwnedFd, StdioError> {
    OpenOptions::new().read(true).write(true).open("/dev/null").map(Into::into).map_err(failed(name))
}

fn failed(name: &'static str) -> impl FnOnce(io::Error) -> StdioError {
    move |source| StdioError::Make { name, source }
}

/// Moves a process's output to the host until the process closes it, or, after `ended` is true, until nothing is
/// left in the pipe: something that outlives the process may hold its end for ever.
///
/// Returns how many bytes the stream took, and the stream, which must stay open.
pub(crate) async fn pump_out(
    mut pipe: pipe::Receiver,
    mut stream: Stream,
    mut ended: watch::Receiver<bool>,
) -> (u64, Stream) {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let read = tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => read,
            _ = ended.wait_for(|ended| *ended) => {
                // Asks the kernel itself: the runtime may not have heard yet of what came just before the end.
                nix::unistd::read(pipe.as_fd(), &mut buffer).map_err(Into::into)
            }
        };
        let Ok(length @ 1..) = read else { break };
        // A host that has gone away closes the pipe, and the process finds out as it would at a shell.
        if stream.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        total += length as u64;
    }
    // The count below is only as good as the bytes before it.
    let _ = stream.flush().await;
    (total, stream)
}

/// How much of stdin has been taken from the host, and how much there will be.
#[derive(Debug, Clone)]
pub(crate) struct StdinProgress {
    taken: Arc<AtomicU64>,
    total: watch::Sender<Option<u64>>,
}

impl StdinProgress {
    pub(crate) fn new() -> Self {
        Self { taken: Arc::default(), total: watch::Sender::new(None) }
    }

    /// The host has sent its last byte. False when more than `total` bytes have been read already.
    pub(crate) fn end_at(&self, total: u64) -> bool {
        if self.taken.load(Ordering::Relaxed) > total {
            return false;
        }
        self.total.send_replace(Some(total));
        true
    }
}

/// Moves the host's bytes to a process until the announced end, or until either side has closed.
pub(crate) async fn pump_in(mut stream: Stream, mut pipe: pipe::Sender, progress: StdinProgress) {
    let mut total = progress.total.subscribe();
    let mut buffer = vec![0; BUFFER];
    loop {
        let taken = progress.taken.load(Ordering::Relaxed);
        let left = match *total.borrow_and_update() {
            None => BUFFER,
            Some(total) => usize::try_from(total.saturating_sub(taken)).unwrap_or(BUFFER).min(BUFFER),
        };
        if left == 0 {
            return;
        }
        let length = tokio::select! {
            read = stream.read(&mut buffer[..left]) => match read {
                Ok(length @ 1..) => length,
                _ => return,
            },
            changed = total.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        progress.taken.fetch_add(length as u64, Ordering::Relaxed);
        if pipe.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
