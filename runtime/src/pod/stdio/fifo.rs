//! Fifos and files of the caller, opened such that they neither block us when their reader is late nor end when it
//! comes and goes, as containerd's clients do when they detach and attach again.

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

use super::{Sink, StdioError};

/// The fifo of a stdin, found and not open yet.
///
/// A client whose write waits for a reader knows by then that the container exists and can close its stdin (CloseIO).
/// One that finds a reader earlier hands over all of its input, and may forget to report the end: `ctr` of containerd
/// 1.6 does where its input ends before its Create request is answered. So a fifo gets its reader when the process starts.
#[derive(Debug)]
pub struct StdinFifo {
    /// Opened with O_PATH: neither a reader nor a writer, and still the same fifo if its name is removed.
    handle: OwnedFd,
    path: PathBuf,
}

/// The reading end of a stdin fifo, with a writing end of our own that keeps it from ending while clients detach and
/// attach again.
#[derive(Debug)]
pub struct Stdin {
    pub(super) reader: pipe::Receiver,
    keeper: Option<OwnedFd>,
    fifo: StdinFifo,
}

impl StdinFifo {
    /// # Errors
    /// It is not there, or not a fifo.
    pub(super) fn find(path: &Path) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Open { stream: "stdin", path: path.into(), source };
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
        let handle = handle.map_err(failed)?;
        match is_fifo(&handle).map_err(failed)? {
            true => Ok(Self { handle: handle.into(), path: path.into() }),
            false => Err(StdioError::NotFifo { stream: "stdin", path: path.into() }),
        }
    }

    /// Opens the reading end, which lets waiting clients write. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(&self) -> Result<Stdin, StdioError> {
        let failed = |source| StdioError::Open { stream: "stdin", path: self.path.clone(), source };
        let again = || Ok(Self { handle: self.handle.try_clone()?, path: self.path.clone() });
        let reader = self.end(OpenOptions::new().read(true)).map_err(failed)?;
        let mut stdin = Stdin {
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

impl Stdin {
    pub(super) fn is_kept(&self) -> bool {
        self.keeper.is_some()
    }

    /// From now on the fifo ends when the last client has closed it.
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
        // The kernel reports the hang-up since there has been a writer, the one that was just closed.
        let mut fds = [PollFd::new(self.reader.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        // Without a wait in between, what a client does in this moment is seen by the next read.
        self.keep()?;
        Ok(events.contains(PollFlags::POLLHUP) && !events.contains(PollFlags::POLLIN))
    }
}

/// A fifo, or a file that is there already and is appended to.
///
/// # Errors
/// It is not there.
pub(super) fn open_output(stream: &'static str, path: &Path) -> Result<Sink, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    if path.metadata().map_err(failed)?.is_file() {
        return Ok(file(open(OpenOptions::new().append(true), path).map_err(failed)?));
    }
    // Read and write: the open does not wait for a reader, and writes do not fail while there is none.
    let file = open(OpenOptions::new().read(true).write(true), path).map_err(failed)?;
    if !is_fifo(&file).map_err(failed)? {
        return Err(StdioError::NotFifo { stream, path: path.into() });
    }
    pipe::Sender::from_file(file).map(Sink::Pipe).map_err(failed)
}

/// A file that is appended to, and made with its directories if it is not there.
///
/// # Errors
/// It can be neither opened nor made.
pub(super) fn append(stream: &'static str, path: &Path) -> Result<Sink, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed)?;
    }
    open(OpenOptions::new().append(true).create(true).mode(0o644), path).map(file).map_err(failed)
}

fn file(file: File) -> Sink {
    Sink::File(tokio::fs::File::from_std(file))
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY).open(path)
}

fn is_fifo(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_fifo())
}
