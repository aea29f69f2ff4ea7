//! Opens the caller's fifos and files. A late reader does not block machinen, and streams survive when
//! clients detach and attach again.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::unix::pipe;

use super::{OutputSink, StdioError};

/// The fifo of a stdin, which exists and is not open yet.
///
/// A fifo gets its reader only when the process starts. A client whose write waits for a reader knows by then
/// that the container exists, and can close its stdin (CloseIO). A client that finds a reader earlier may
/// write all of its input and then fail to report the end: `ctr` of containerd 1.6 does so if its input ends
/// before its Create request is answered.
#[derive(Debug)]
pub struct StdinFifo {
    /// Opened with O_PATH: neither a reader nor a writer, and still the same fifo if its name is removed.
    handle: OwnedFd,
    path: PathBuf,
}

/// The reading end of a stdin fifo, with a writing end that keeps the stream from ending while clients detach
/// and attach again.
#[derive(Debug)]
pub struct FifoReader {
    pub(super) reader: pipe::Receiver,
    keeper: Option<OwnedFd>,
    fifo: StdinFifo,
}

impl StdinFifo {
    /// # Errors
    /// The path does not exist, or is not a fifo.
    pub(super) fn find(path: &Path) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Open { stream: "stdin", path: path.into(), source };
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
        let handle = handle.map_err(failed)?;
        match is_fifo(&handle).map_err(failed)? {
            true => Ok(Self { handle: handle.into(), path: path.into() }),
            false => Err(StdioError::NotFifo { stream: "stdin", path: path.into() }),
        }
    }

    /// Opens the reading end, so that waiting clients can write. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The errors of open(2).
    pub(super) fn open(&self) -> Result<FifoReader, StdioError> {
        let failed = |source| StdioError::Open { stream: "stdin", path: self.path.clone(), source };
        let again = || Ok(Self { handle: self.handle.try_clone()?, path: self.path.clone() });
        let reader = self.end(OpenOptions::new().read(true)).map_err(failed)?;
        let mut stdin = FifoReader {
            reader: pipe::Receiver::from_file(reader).map_err(failed)?,
            keeper: None,
            fifo: again().map_err(failed)?,
        };
        stdin.keep().map_err(failed)?;
        Ok(stdin)
    }

    fn end(&self, options: &mut OpenOptions) -> io::Result<File> {
        open(options, Path::new(&format!("/proc/self/fd/{}", self.handle.as_raw_fd())))
    }
}

impl FifoReader {
    pub(super) fn is_kept(&self) -> bool {
        self.keeper.is_some()
    }

    /// Closes the writing end: the stream ends when the last client has closed the fifo.
    pub(super) fn release(&mut self) {
        self.keeper = None;
    }

    fn keep(&mut self) -> io::Result<()> {
        self.keeper = Some(self.fifo.end(OpenOptions::new().write(true))?.into());
        Ok(())
    }

    /// Whether the fifo is empty and no client has it open for writing.
    pub(super) fn is_abandoned(&mut self) -> io::Result<bool> {
        self.release();
        // The kernel reports a hang-up only if there has been a writer: the writing end that was just closed.
        let mut fds = [PollFd::new(self.reader.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        // There is no await in between, so the next read sees the data of a client that opens the fifo at
        // this moment.
        self.keep()?;
        Ok(events.contains(PollFlags::POLLHUP) && !events.contains(PollFlags::POLLIN))
    }
}

/// Opens a fifo, or an existing file for appending.
///
/// # Errors
/// The path does not exist.
pub(super) fn open_output(stream: &'static str, path: &Path) -> Result<OutputSink, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    if path.metadata().map_err(failed)?.is_file() {
        return Ok(file(open(OpenOptions::new().append(true), path).map_err(failed)?));
    }
    // Opened for reading and writing: the open does not wait for a reader, and writes do not fail while there
    // is none.
    let file = open(OpenOptions::new().read(true).write(true), path).map_err(failed)?;
    if !is_fifo(&file).map_err(failed)? {
        return Err(StdioError::NotFifo { stream, path: path.into() });
    }
    pipe::Sender::from_file(file).map(OutputSink::Pipe).map_err(failed)
}

/// Opens a file for appending; creates the file and its directories if they are missing.
///
/// # Errors
/// The file can be neither opened nor created.
pub(super) fn append(stream: &'static str, path: &Path) -> Result<OutputSink, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed)?;
    }
    open(OpenOptions::new().append(true).create(true).mode(0o644), path).map(file).map_err(failed)
}

fn file(file: File) -> OutputSink {
    OutputSink::File(tokio::fs::File::from_std(file))
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY).open(path)
}

fn is_fifo(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_fifo())
}
