//! Fifos and files of the caller, opened such that they neither block us when their reader is late nor end when it
//! comes and goes, as containerd's clients do when they detach and attach again.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
    path::Path,
};

use tokio::net::unix::pipe;

use super::{Sink, StdioError};

/// A stdin fifo and our own writing end of it, which keeps it from ending before the caller says so.
#[derive(Debug)]
pub struct Stdin {
    pub(super) reader: pipe::Receiver,
    pub(super) keeper: pipe::Sender,
}

/// # Errors
/// It is not there, or not a fifo.
pub(super) fn open_stdin(path: &Path) -> Result<Stdin, StdioError> {
    let failed = |source| StdioError::Open { stream: "stdin", path: path.into(), source };
    let open = |options: &mut OpenOptions| -> Result<File, StdioError> {
        let file = open(options, path).map_err(failed)?;
        match is_fifo(&file).map_err(failed)? {
            true => Ok(file),
            false => Err(StdioError::NotFifo { stream: "stdin", path: path.into() }),
        }
    };
    let reader = open(OpenOptions::new().read(true))?;
    let keeper = open(OpenOptions::new().write(true))?;
    Ok(Stdin {
        reader: pipe::Receiver::from_file(reader).map_err(failed)?,
        keeper: pipe::Sender::from_file(keeper).map_err(failed)?,
    })
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
