//! The log of a container's output, in the format of Kubernetes' container logs, which Podman has, too:
//! `TIME STREAM TAG TEXT`, where the tag is F for a line and P for a part of one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// After as many bytes the log begins anew, and the file before it is replaced.
const MAX_LOG: u64 = 16 << 20;
/// The ending of the name of the file before.
const EARLIER: &str = "log.1";

/// A log that is being written.
#[derive(Debug)]
pub(super) struct OutputLog {
    path: PathBuf,
    file: File,
    bytes: u64,
}

/// A line of a log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LogLine<'a> {
    pub(crate) time: &'a str,
    pub(crate) is_stderr: bool,
    /// The line continues with the next one of its stream.
    pub(crate) is_part: bool,
    pub(crate) text: &'a [u8],
}

impl OutputLog {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: create(path)?, bytes: 0 })
    }

    /// Appends what a stream has brought.
    pub(super) fn append(&mut self, stream: &str, bytes: &[u8]) -> io::Result<()> {
        let mut text = Vec::new();
        let time = humantime::format_rfc3339_nanos(SystemTime::now());
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (tag, piece) = piece.strip_suffix(b"\n").map_or(('P', piece), |line| ('F', line));
            write!(text, "{time} {stream} {tag} ")?;
            text.extend_from_slice(piece);
            text.push(b'\n');
        }
        if self.bytes + text.len() as u64 > MAX_LOG {
            fs::rename(&self.path, self.path.with_extension(EARLIER))?;
            self.file = create(&self.path)?;
            self.bytes = 0;
        }
        self.bytes += text.len() as u64;
        self.file.write_all(&text)
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().create_new(true).append(true).mode(0o600).open(path)
}

impl<'a> LogLine<'a> {
    /// None if it is no line of such a log.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut fields = line.splitn(4, |byte| *byte == b' ');
        let (time, stream, tag, text) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let is_stderr = match stream {
            b"stdout" => false,
            b"stderr" => true,
            _ => return None,
        };
        Some(Self { time: std::str::from_utf8(time).ok()?, is_stderr, is_part: tag == b"P", text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut log = OutputLog::open(&path).unwrap();
        log.append("stdout", b"one\ntwo").unwrap();
        log.append("stderr", b"bad \xff\n\n").unwrap();
        let bytes = fs::read(&path).unwrap();
        let lines: Vec<_> = bytes.split(|byte| *byte == b'\n').filter_map(LogLine::parse).collect();
        let read: Vec<_> = lines.iter().map(|line| (line.is_stderr, line.is_part, line.text)).collect();
        assert_eq!(
            read,
            [
                (false, false, &b"one"[..]),
                (false, true, b"two"),
                (true, false, b"bad \xff"),
                (true, false, b"")
            ]
        );
        assert!(lines[0].time.ends_with('Z'));
        for odd in [&b""[..], b"x", b"t stdin F x"] {
            assert_eq!(LogLine::parse(odd), None);
        }
    }

    #[test]
    fn a_log_takes_a_bounded_part_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("output.log");
        let mut log = OutputLog::open(&path).unwrap();
        let line = [b"x".repeat((1 << 20) - 1), b"\n".to_vec()].concat();
        for _ in 0..40 {
            log.append("stdout", &line).unwrap();
        }
        let sizes: u64 =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(sizes <= 2 * MAX_LOG && fs::read_dir(dir.path()).unwrap().count() == 2, "{sizes}");
    }
}
