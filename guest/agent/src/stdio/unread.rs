//! What waits in a process's stdin: in its pipe, and before that in the agent. A checkpoint carries it over.
//!
//! ```text
//!   host ── stream ──> pump ── Waiting ──> pipe ──> process
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

/// Most bytes that a checkpoint carries over: more than an unprivileged process's pipe and the agent's buffers hold.
pub(crate) const MAX_UNREAD: usize = 2 << 20;

/// Bytes that were taken from the host and are not in the process's pipe yet.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    bytes: Vec<u8>,
    /// Bytes at the start that the pipe has.
    written: usize,
}

impl Waiting {
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

/// A pipe that was made for a process. It is open here neither for reading nor for writing, so that the process and whoever
/// is at the other end see each other close it.
#[derive(Debug)]
pub(crate) struct Pipe {
    handle: File,
    inode: u64,
}

impl Pipe {
    /// # Errors
    /// Those of open(2).
    pub(super) fn of(end: &OwnedFd) -> io::Result<Self> {
        let handle =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path_of(end.as_raw_fd()))?;
        let inode = handle.metadata()?.ino();
        Ok(Self { handle, inode })
    }

    /// As CRIU names it.
    pub(crate) fn name(&self) -> String {
        format!("pipe:[{}]", self.inode)
    }

    /// A copy of what is in it. No process may read or write meanwhile.
    ///
    /// # Errors
    /// It holds more than [`MAX_UNREAD`], or the kernel does not copy it.
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
        // tee(2) copies references to pages: the other pipe needs as much room, however little is in each of them.
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

    /// What is in it, and what will be.
    ///
    /// # Errors
    /// It is more than [`MAX_UNREAD`], or the kernel does not copy it.
    pub(super) fn unread(&self, waiting: &Waiting) -> io::Result<Vec<u8>> {
        let mut unread = self.content()?;
        unread.extend_from_slice(waiting.bytes());
        if unread.len() > MAX_UNREAD { Err(too_much()) } else { Ok(unread) }
    }
}

fn path_of(fd: i32) -> PathBuf {
    format!("/proc/self/fd/{fd}").into()
}

fn too_much() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {MAX_UNREAD} bytes wait in it"))
}

/// Writes `unread` where [`read`] finds it. Nothing is written where nothing waits.
///
/// # Errors
/// Those of the file system.
pub(crate) fn save(unread: &[u8], path: &std::path::Path) -> io::Result<()> {
    if unread.is_empty() { Ok(()) } else { fs::write(path, unread) }
}

/// What [`save`] has written.
///
/// # Errors
/// Those of the file system, or it is larger than anything that was written.
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
        assert_eq!(pipe.unread(&Waiting::default()).unwrap(), b"");
        // Pieces that fill no page, and some that do.
        let content: Vec<u8> = (0..=255).cycle().take(50_000).collect();
        write.write_all(&content[..10]).unwrap();
        write.write_all(&content[10..20]).unwrap();
        write.write_all(&content[20..]).unwrap();
        let mut waiting = Waiting::default();
        waiting.push(b"abc");
        waiting.advance(1);
        let unread = [&content[..], b"bc"].concat();
        assert_eq!(pipe.unread(&waiting).unwrap(), unread);
        assert_eq!(pipe.unread(&waiting).unwrap(), unread);
        let mut all = vec![0; content.len()];
        read.read_exact(&mut all).unwrap();
        assert_eq!(all, content);
        assert_eq!(pipe.unread(&waiting).unwrap(), b"bc");
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
            assert_eq!(pipe.unread(&Waiting::default()).unwrap(), vec![7; length]);
        }
    }

    #[test]
    fn ends_are_seen_through_it() {
        let (mut read, mut write, pipe) = made();
        write.write_all(b"last").unwrap();
        drop(write);
        assert_eq!(pipe.unread(&Waiting::default()).unwrap(), b"last");
        let mut rest = Vec::new();
        read.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last");
        let (read, mut write, pipe) = made();
        drop(read);
        assert_eq!(pipe.unread(&Waiting::default()).unwrap(), b"");
        assert_eq!(write.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(pipe.name().starts_with("pipe:["));
    }

    #[test]
    fn more_than_is_carried_is_an_error() {
        let (_read, _write, pipe) = made();
        let mut waiting = Waiting::default();
        waiting.push(&vec![1; MAX_UNREAD]);
        assert_eq!(pipe.unread(&waiting).unwrap().len(), MAX_UNREAD);
        waiting.push(b"2");
        assert!(pipe.unread(&waiting).unwrap_err().to_string().contains("more than"));
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
