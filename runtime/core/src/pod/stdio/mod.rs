//! A process's standard streams on the host: the caller's fifos, files and logging programs at one end, raw
//! streams to the guest at the other.
//!
//! The control channel reports the end of each stream as a byte count (see machinen-protocol), so no code
//! here infers it from a closed connection.

mod fifo;
mod input;
mod logger;
mod output;
mod unread;
mod uri;

use std::{
    io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    process::ProcessError,
};
use tokio::{io::AsyncWrite, net::unix::pipe};

use self::uri::StreamTarget;

pub use self::{
    fifo::{StdinFifo, StdinReader},
    input::{StdinCopy, StdinEnd},
    logger::Logger,
    output::{DiscardOutput, OutputCopy},
};

const BUFFER: usize = 64 << 10;

/// The names of the standard streams that a caller asks for; an empty name is /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioNames {
    /// The fifo that stdin is read from; empty if the process has no stdin.
    pub stdin: String,
    /// The fifo or URI that receives stdout; empty if the output is discarded.
    pub stdout: String,
    /// The fifo or URI that receives stderr; empty if the output is discarded.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// The process that the streams belong to, for logging programs.
#[derive(Debug, Clone)]
pub struct StreamOwner {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container, or of the process that was added to it.
    pub id: String,
}

/// Why a standard stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The URI has an unknown scheme.
    #[error(
        "{stream} {name:?} is not understood; it takes a path, fifo:///path, file:///path, binary:///program?k=v or \
         binary-v2:///program?k=v"
    )]
    Scheme {
        /// The name of the stream.
        stream: &'static str,
        /// The name that the caller gave.
        name: String,
    },
    /// Stdin is not a fifo's path.
    #[error("stdin cannot be {name:?}: it takes a path or fifo:///path")]
    Stdin {
        /// The name that the caller gave.
        name: String,
    },
    /// Stderr names a logging program; only stdout may.
    #[error("stderr cannot be {name:?}: a logging program takes stderr together with stdout")]
    Stderr {
        /// The name that the caller gave.
        name: String,
    },
    /// A process with a terminal was to have a stderr.
    #[error("a terminal has one output, but stderr is {name:?}")]
    TerminalStderr {
        /// The name that the caller gave.
        name: String,
    },
    /// A file or fifo cannot be opened.
    #[error("cannot open {stream} {}", path.display())]
    Open {
        /// The name of the stream.
        stream: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a fifo.
    #[error("{stream} {} is not a fifo", path.display())]
    NotFifo {
        /// The name of the stream.
        stream: &'static str,
        /// The file or directory.
        path: PathBuf,
    },
    /// A pipe to the logging program cannot be made.
    #[error("cannot make a pipe to the logging program")]
    Pipe(#[source] io::Error),
    /// The logging program cannot be started.
    #[error("cannot start the logging program")]
    Logger(#[source] ProcessError),
    /// The logging program did not report in time that it is ready.
    #[error("logging program {program} is not ready within {limit:?}")]
    LoggerNotReady {
        /// The logging program.
        program: String,
        /// How long the program had.
        limit: Duration,
    },
    /// The logging program has ended without a report that it is ready.
    #[error(
        "logging program {program} has closed fd 5 without writing a byte to it, which binary-v2 asks for"
    )]
    LoggerSilent {
        /// The logging program.
        program: String,
    },
}

impl HasKind for StdioError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Logger(ProcessError::NotFound { .. }) => ErrorKind::NotFound,
            Self::Logger(_) | Self::Pipe(_) | Self::LoggerSilent { .. } => ErrorKind::Internal,
            Self::LoggerNotReady { .. } => ErrorKind::DeadlineExceeded,
            Self::Scheme { .. }
            | Self::Stdin { .. }
            | Self::Stderr { .. }
            | Self::TerminalStderr { .. }
            | Self::Open { .. }
            | Self::NotFifo { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// The host ends of a process's standard streams. The outputs are open.
#[derive(Debug)]
pub struct HostStdio {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Opened later: see [`StdinFifo`].
    pub stdin: Option<StdinFifo>,
    /// What receives stdout; None if the output is discarded.
    pub stdout: Option<OutputSink>,
    /// What receives stderr; None if the output is discarded.
    pub stderr: Option<OutputSink>,
    /// The logging program, if there is one.
    pub logger: Option<Logger>,
}

/// The destination of an output stream.
#[derive(Debug)]
pub enum OutputSink {
    /// A fifo or pipe.
    Pipe(pipe::Sender),
    /// A file that is appended to.
    File(tokio::fs::File),
}

impl HostStdio {
    /// Opens the outputs, finds the input and starts logging programs, without waiting. Must be called inside
    /// a tokio runtime.
    ///
    /// # Errors
    /// The first stream that does not exist or has an invalid name.
    pub fn open(names: &StdioNames, owner: &StreamOwner) -> Result<Self, StdioError> {
        let mut stdio =
            Self { terminal: names.terminal, stdin: None, stdout: None, stderr: None, logger: None };
        let (stdout, stderr) =
            (StreamTarget::parse("stdout", &names.stdout)?, StreamTarget::parse("stderr", &names.stderr)?);
        match StreamTarget::parse("stdin", &names.stdin)? {
            StreamTarget::Null => {}
            StreamTarget::Fifo(path) => stdio.stdin = Some(StdinFifo::find(&path)?),
            _ => return Err(StdioError::Stdin { name: names.stdin.clone() }),
        }
        let mut shared = None;
        stdio.stdout = match &stdout {
            StreamTarget::Null => None,
            StreamTarget::Fifo(path) => Some(fifo::open_output("stdout", path)?),
            StreamTarget::File(path) => Some(fifo::append("stdout", path)?),
            StreamTarget::Program(program) => {
                let (logger, ends) = Logger::start(program, owner)?;
                stdio.logger = Some(logger);
                shared = Some(ends.stderr);
                Some(OutputSink::Pipe(ends.stdout))
            }
        };
        // containerd's clients pass the same program or file for both outputs; a terminal has no second
        // output.
        let same = names.stderr == names.stdout;
        stdio.stderr = match stderr {
            StreamTarget::Null => None,
            _ if names.terminal && same => None,
            _ if names.terminal => return Err(StdioError::TerminalStderr { name: names.stderr.clone() }),
            StreamTarget::Fifo(path) => Some(fifo::open_output("stderr", &path)?),
            StreamTarget::File(path) => Some(fifo::append("stderr", &path)?),
            StreamTarget::Program(_) if same => shared.map(OutputSink::Pipe),
            StreamTarget::Program(_) => return Err(StdioError::Stderr { name: names.stderr.clone() }),
        };
        Ok(stdio)
    }

    /// Waits until the logging program is ready.
    ///
    /// # Errors
    /// The logging program did not become ready.
    pub async fn ready(&mut self) -> Result<(), StdioError> {
        match &mut self.logger {
            None => Ok(()),
            Some(logger) => logger.ready().await,
        }
    }
}

impl AsyncWrite for OutputSink {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            Self::File(file) => Pin::new(file).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_flush(cx),
            Self::File(file) => Pin::new(file).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_shutdown(cx),
            Self::File(file) => Pin::new(file).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests;
