//! The unread bytes of a process's stdin, in its pipe and in the agent. A checkpoint carries them over.
//!
//! ```text
//!   host ── stream ──> pump ── Backlog ──> pipe ──> process
//!                              └──────── unread ────┘
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    },
    path::PathBuf,
};

use rustix::{
    io::ioctl_fionread,
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, tee},
};

/// Most bytes that a checkpoint carries over: more than an unprivileged process's pipe and the agent's
/// buffers hold.
pub(crate) const MAX_UNREAD: usize = 2 << 20;

/// Bytes from the host that are not in the process's pipe yet.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    /// Number of bytes at the start that are in the pipe.
    written: usize,
}

impl Backlog {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.bytes().is_empty() {
            self.clear();
        }
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    pub(super) fn advance(&mut self, written: usize) {
        self.written += written;
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.written = 0;
    }
}

/// A pipe that was made for a process. The agent has it open neither for reading nor for writing, so that
/// each end still notices when the other is closed.
#[derive(Debug)]
pub(crate) struct Pipe {
    handle: File,
    inode: u64,
}

impl Pipe {
    /// The pipe with this end.
    ///
    /// # Errors
    /// Those of open(2).
    pub(super) fn of(end: &OwnedFd) -> io::Result<Self> {
        let handle =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path_of(end.as_raw_fd()))?;
        let inode = handle.metadata()?.ino();
        Ok(Self { handle, inode })
    }

    /// CRIU's name of the pipe.
    pub(crate) fn name(&self) -> String {
        format!("pipe:[{}]", self.inode)
    }

    /// Copies the content of the pipe. No process may read or write it meanwhile.
    ///
    /// # Errors
    /// The pipe holds more than [`MAX_UNREAD`], or the kernel cannot copy it.
    fn content(&self) -> io::Result<Vec<u8>> {
        let path = path_of(self.handle.as_raw_fd());
        let pipe = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let length = usize::try_from(ioctl_fionread(&pipe)?).unwrap_or(usize::MAX);
        if length == 0 {
            return Ok(Vec::new());
        }
        if length > MAX_UNREAD {
            return Err(too_much());
        }
        // tee(2) copies references to pages: the other pipe needs as many, however little each of them holds.
        let (copy, to) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&to, fcntl_getpipe_size(&pipe)?)?;
        let copied = tee(pipe.as_fd(), to.as_fd(), length, SpliceFlags::NONBLOCK)?;
        let mut content = vec![0; length];
        File::from(copy).read_exact(&mut content[..copied])?;
        match copied == length {
            true => Ok(content),
            false => Err(io::Error::other(format!("{copied} of {length} bytes were copied"))),
        }
    }

    /// The content of the pipe, and the backlog that follows it.
    ///
    /// # Errors
    /// The bytes are more than [`MAX_UNREAD`], or the kernel cannot copy them.
    pub(super) fn unread(&self, backlog: &Backlog) -> io::Result<Vec<u8>> {
        let mut unread = self.content()?;
        unread.extend_from_slice(backlog.bytes());
        if unread.len() > MAX_UNREAD { Err(too_much()) } else { Ok(unread) }
    }
}

fn path_of(fd: i32) -> PathBuf {
    format!("/proc/self/fd/{fd}").into()
}

fn too_much() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_UNREAD} bytes are unread"))
}

/// Writes `unread` to a file for [`read`]. Writes no file if nothing is unread.
///
/// # Errors
/// Those of the file system.
pub(crate) fn save(unread: &[u8], path: &std::path::Path) -> io::Result<()> {
    if unread.is_empty() { Ok(()) } else { fs::write(path, unread) }
}

/// Reads the bytes that [`save`] has written.
///
/// # Errors
/// Those of the file system, or the file is too large to come from [`save`].
pub(crate) fn read(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let file = match File::open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut unread = Vec::new();
    file.take(MAX_UNREAD as u64 + 1).read_to_end(&mut unread)?;
    if unread.len() > MAX_UNREAD { Err(too_much()) } else { Ok(unread) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn made() -> (File, File, Pipe) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let pipe = Pipe::of(&write).unwrap();
        (read.into(), write.into(), pipe)
    }

    #[test]
    fn what_waits_is_copied_and_stays() {
        let (mut read, mut write, pipe) = made();
        assert_eq!(pipe.unread(&Backlog::default()).unwrap(), b"");
        // Pieces that fill no page, and some that do.
        let content: Vec<u8> = (0..=255).cycle().take(50_000).collect();
        write.write_all(&content[..10]).unwrap();
        write.write_all(&content[10..20]).unwrap();
        write.write_all(&content[20..]).unwrap();
        let mut backlog = Backlog::default();
        backlog.push(b"abc");
        backlog.advance(1);
        let unread = [&content[..], b"bc"].concat();
        assert_eq!(pipe.unread(&backlog).unwrap(), unread);
        assert_eq!(pipe.unread(&backlog).unwrap(), unread);
        let mut all = vec![0; content.len()];
        read.read_exact(&mut all).unwrap();
        assert_eq!(all, content);
        assert_eq!(pipe.unread(&backlog).unwrap(), b"bc");
    }

    #[test]
    fn a_full_pipe_of_any_size_is_copied() {
        for size in [4096, 64 << 10, 1 << 20] {
            let (_read, mut write, pipe) = made();
            fcntl_setpipe_size(&write, size).unwrap();
            let mut length = 0;
            while let Ok(written) = write.write(&[7; 4096]) {
                length += written;
            }
            assert_eq!(pipe.unread(&Backlog::default()).unwrap(), vec![7; length]);
        }
    }

    #[test]
    fn ends_are_seen_through_it() {
        let (mut read, mut write, pipe) = made();
        write.write_all(b"last").unwrap();
        drop(write);
        assert_eq!(pipe.unread(&Backlog::default()).unwrap(), b"last");
        let mut rest = Vec::new();
        read.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last");
        let (read, mut write, pipe) = made();
        drop(read);
        assert_eq!(pipe.unread(&Backlog::default()).unwrap(), b"");
        assert_eq!(write.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(pipe.name().starts_with("pipe:["));
    }

    #[test]
    fn more_than_is_carried_is_an_error() {
        let (_read, _write, pipe) = made();
        let mut backlog = Backlog::default();
        backlog.push(&vec![1; MAX_UNREAD]);
        assert_eq!(pipe.unread(&backlog).unwrap().len(), MAX_UNREAD);
        backlog.push(b"2");
        assert!(pipe.unread(&backlog).unwrap_err().to_string().contains("more than"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdin");
        assert_eq!(read(&path).unwrap(), b"");
        save(b"", &path).unwrap();
        assert!(!path.exists());
        save(b"kept", &path).unwrap();
        assert_eq!(read(&path).unwrap(), b"kept");
        fs::write(&path, vec![1; MAX_UNREAD + 1]).unwrap();
        assert!(read(&path).is_err());
    }
}
