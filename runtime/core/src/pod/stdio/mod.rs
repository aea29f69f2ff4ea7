//! A process's standard streams on the host: the caller's fifos, files, logging programs or descriptors at one
//! end, raw streams to the guest at the other.
//!
//! The control channel reports the end of each stream as a byte count (see machinen-protocol), so no code
//! here infers it from a closed connection.

mod fifo;
mod inherited;
mod input;
mod logger;
mod output;
mod source;
mod unread;
mod uri;

use std::{
    io,
    os::fd::OwnedFd,
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

use self::{fifo::StdinFifo, inherited::InheritedStream, source::InheritedInput, uri::StreamTarget};

pub use self::{
    input::{StdinCopy, StdinEnd},
    logger::Logger,
    output::{DiscardOutput, OutputCopy},
    source::{ProcessStdio, StdinReader, StdinSource, StdioNames, StdioSource},
    uri::StreamUri,
};

const BUFFER: usize = 64 << 10;

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
    /// A descriptor that was passed on cannot be used as a stream.
    #[error("cannot use the inherited descriptor of {stream}")]
    Inherited {
        /// The name of the stream.
        stream: &'static str,
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
            | Self::Open { .. }
            | Self::Inherited { .. }
            | Self::NotFifo { .. } => ErrorKind::InvalidArgument,
        }
    }
}

/// The host ends of a process's standard streams. The outputs are open.
#[derive(Debug)]
pub struct HostStdio {
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Opened when the process starts.
    pub stdin: Option<StdinSource>,
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
    /// A descriptor of the caller.
    Inherited(InheritedStream),
}

impl HostStdio {
    /// Opens the outputs, finds the input and starts logging programs, without waiting. Must be called inside
    /// a tokio runtime.
    ///
    /// # Errors
    /// The first stream that does not exist or has an invalid name.
    pub fn open(stdio: &ProcessStdio, owner: &StreamOwner) -> Result<Self, StdioError> {
        let stdin = open_stdin(&stdio.stdin)?;
        let (logger, stdout, shared) = open_stdout(&stdio.stdout, owner)?;
        let stderr = open_stderr(stdio, shared)?;
        Ok(Self { terminal: stdio.terminal, stdin, stdout, stderr, logger })
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

fn open_stdin(stdin: &StdioSource) -> Result<Option<StdinSource>, StdioError> {
    match stdin {
        StdioSource::Null => Ok(None),
        StdioSource::Named(StreamUri { target: StreamTarget::Fifo(path), .. }) => {
            Ok(Some(StdinSource::Fifo(StdinFifo::find(path)?)))
        }
        StdioSource::Named(uri) => Err(StdioError::Stdin { name: uri.to_string() }),
        StdioSource::Inherited(fd) => Ok(Some(StdinSource::Inherited(InheritedInput::of(fd)?))),
    }
}

/// Opens stdout. A logging program takes stderr as well, so its pipe for stderr is returned too.
fn open_stdout(stdout: &StdioSource, owner: &StreamOwner) -> Result<OpenedStdout, StdioError> {
    let uri = match stdout {
        StdioSource::Null => return Ok((None, None, None)),
        StdioSource::Inherited(fd) => return Ok((None, Some(inherit_output("stdout", fd)?), None)),
        StdioSource::Named(uri) => uri,
    };
    match &uri.target {
        StreamTarget::Fifo(path) => Ok((None, Some(fifo::open_output("stdout", path)?), None)),
        StreamTarget::File(path) => Ok((None, Some(fifo::append("stdout", path)?), None)),
        StreamTarget::Program(program) => {
            let (logger, ends) = Logger::start(program, owner)?;
            Ok((Some(logger), Some(OutputSink::Pipe(ends.stdout)), Some(ends.stderr)))
        }
    }
}

/// The logging program, the sink of stdout, and the program's pipe for stderr.
type OpenedStdout = (Option<Logger>, Option<OutputSink>, Option<pipe::Sender>);

/// Opens stderr. containerd's clients name the same program or file for both outputs. A terminal has no second output, so
/// with one stderr is not used: containerd's CRI plugin names a fifo for it nevertheless.
fn open_stderr(stdio: &ProcessStdio, shared: Option<pipe::Sender>) -> Result<Option<OutputSink>, StdioError> {
    let uri = match &stdio.stderr {
        _ if stdio.terminal => return Ok(None),
        StdioSource::Null => return Ok(None),
        StdioSource::Inherited(fd) => return inherit_output("stderr", fd).map(Some),
        StdioSource::Named(uri) => uri,
    };
    let same = matches!(&stdio.stdout, StdioSource::Named(stdout) if stdout == uri);
    match &uri.target {
        StreamTarget::Fifo(path) => fifo::open_output("stderr", path).map(Some),
        StreamTarget::File(path) => fifo::append("stderr", path).map(Some),
        StreamTarget::Program(_) if same => Ok(shared.map(OutputSink::Pipe)),
        StreamTarget::Program(_) => Err(StdioError::Stderr { name: uri.to_string() }),
    }
}

fn inherit_output(stream: &'static str, fd: &OwnedFd) -> Result<OutputSink, StdioError> {
    let stream = InheritedStream::writer(fd).map_err(|source| StdioError::Inherited { stream, source })?;
    Ok(OutputSink::Inherited(stream))
}

impl AsyncWrite for OutputSink {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            Self::File(file) => Pin::new(file).poll_write(cx, bytes),
            Self::Inherited(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_flush(cx),
            Self::File(file) => Pin::new(file).poll_flush(cx),
            Self::Inherited(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Pipe(pipe) => Pin::new(pipe).poll_shutdown(cx),
            Self::File(file) => Pin::new(file).poll_shutdown(cx),
            Self::Inherited(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests;
