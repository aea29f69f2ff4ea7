//! Where the creator of a process wants its standard streams to lead.

use std::{io, os::fd::OwnedFd};

use super::{
    StdioError,
    fifo::{FifoReader, StdinFifo},
    inherited::InheritedStream,
    uri::StreamUri,
};

/// Where one standard stream of a process leads.
#[derive(Debug, Default)]
pub enum StdioSource {
    /// /dev/null: the process has no stdin, or the output is discarded.
    #[default]
    Null,
    /// The fifo, file or logging program with this name.
    Named(StreamUri),
    /// A descriptor of the caller: a pipe, a file, a socket, a terminal or another device. It is used as long
    /// as the process has the stream.
    Inherited(OwnedFd),
}

/// The standard streams of a process that is to be made.
#[derive(Debug, Default)]
pub struct ProcessStdio {
    /// What stdin is read from.
    pub stdin: StdioSource,
    /// What receives stdout.
    pub stdout: StdioSource,
    /// What receives stderr. A process with a terminal has no second output.
    pub stderr: StdioSource,
    /// Whether the process has a terminal, which is in the guest. The caller sets an inherited terminal to raw
    /// mode, and reports its size.
    pub terminal: bool,
}

/// The names of a process's standard streams; None for a stream without a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioNames {
    /// The name of stdin.
    pub stdin: Option<StreamUri>,
    /// The name of stdout.
    pub stdout: Option<StreamUri>,
    /// The name of stderr.
    pub stderr: Option<StreamUri>,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

impl StdioSource {
    fn name(&self) -> Option<StreamUri> {
        match self {
            Self::Named(uri) => Some(uri.clone()),
            Self::Null | Self::Inherited(_) => None,
        }
    }
}

impl ProcessStdio {
    /// The names of the streams, for reports.
    pub fn names(&self) -> StdioNames {
        StdioNames {
            stdin: self.stdin.name(),
            stdout: self.stdout.name(),
            stderr: self.stderr.name(),
            terminal: self.terminal,
        }
    }
}

/// The caller's end of a stdin, which is opened when the process starts.
#[derive(Debug)]
pub enum StdinSource {
    /// A fifo, which clients may open, close and open again.
    Fifo(StdinFifo),
    /// A descriptor of the caller.
    Inherited(InheritedInput),
}

/// An inherited stdin that is not read yet.
#[derive(Debug)]
pub struct InheritedInput(OwnedFd);

/// The caller's end of the stdin of a process that has started.
#[derive(Debug)]
pub enum StdinReader {
    /// A fifo. It ends after CloseIO, or if no client opens it.
    Fifo(FifoReader),
    /// A descriptor of the caller. It ends by itself, so CloseIO has no effect on it.
    Inherited(InheritedStream),
}

impl InheritedInput {
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub(super) fn of(fd: &OwnedFd) -> Result<Self, StdioError> {
        fd.try_clone().map(Self).map_err(|source| StdioError::Inherited { stream: "stdin", source })
    }
}

impl StdinSource {
    /// Opens the reading end. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn open(&self) -> Result<StdinReader, StdioError> {
        match self {
            Self::Fifo(fifo) => fifo.open().map(StdinReader::Fifo),
            Self::Inherited(InheritedInput(fd)) => {
                let failed = |source| StdioError::Inherited { stream: "stdin", source };
                InheritedStream::reader(fd).map(StdinReader::Inherited).map_err(failed)
            }
        }
    }
}

impl StdinReader {
    /// Whether the input comes from clients that may be late, or never come.
    pub(super) fn has_clients(&self) -> bool {
        matches!(self, Self::Fifo(_))
    }

    /// Whether the input stays open although no client has it open.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, Self::Fifo(fifo) if fifo.is_kept())
    }

    /// The input ends from now on when the last client has closed it.
    pub(super) fn release(&mut self) {
        if let Self::Fifo(fifo) = self {
            fifo.release();
        }
    }

    /// Whether there is no input, and no client that could send some.
    pub(super) fn is_abandoned(&mut self) -> io::Result<bool> {
        match self {
            Self::Fifo(fifo) => fifo.is_abandoned(),
            Self::Inherited(_) => Ok(false),
        }
    }

    /// Waits until there may be something to read.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.reader.readable().await,
            Self::Inherited(stream) => stream.readable().await,
        }
    }

    /// Reads what is there; 0 at the end. Cancelling this loses nothing.
    pub(super) async fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Fifo(fifo) => fifo.reader.try_read(buffer),
            Self::Inherited(stream) => stream.read_now(buffer).await,
        }
    }
}
