//! `machinen logs`: the output of a container, from the file that its keeper or Podman's conmon writes.
//!
//! With --follow the end comes with the process that stands for the container: what it has printed is in the log by then,
//! or arrives before the file's writer ends.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
};

use clap::Args;
use machinen::{
    fs::{FileError, Links, open_regular},
    sys,
    watch::FileWatch,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::error::EverydayError;
use crate::{
    boot::keeper::{LOG, LogLine},
    find::{self, FoundContainer, ManagersVerb, writer_of_log},
    oci::GlobalArgs,
};

/// Most bytes of one line of a log; what is longer was not written by conmon or a keeper.
const MAX_LINE: u64 = 1 << 20;

/// Arguments of `machinen logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Print what follows, until the container ends
    #[arg(long, short)]
    follow: bool,
    /// Only the last lines
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<usize>,
    /// Print the time before each line
    #[arg(long, short)]
    timestamps: bool,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// # Errors
/// The container has no log, or it cannot be read.
pub(super) async fn run(global: &GlobalArgs, args: &LogsArgs) -> Result<(), EverydayError> {
    let container = find::one(global, &args.container).await?;
    let path = log_of(&container)?;
    let mut log = LogReader::open(&path)?;
    // Before the log is read, so that nothing is missed.
    let watch = FileWatch::new().and_then(|watch| watch.file(&path).map(|()| watch));
    let watch = watch.map_err(FileError::at("watch", &path))?;
    let writer = writer_of_log(&container).and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let writer = writer.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    match args.tail {
        Some(lines) => log.print_last(lines, args.timestamps)?,
        None => log.print(args.timestamps)?,
    }
    let (true, Some(writer)) = (args.follow, writer) else { return Ok(()) };
    let writer = sys::async_fd(writer).map_err(FileError::at("watch the writer of", &path))?;
    loop {
        tokio::select! {
            changed = watch.changed() => changed.map_err(FileError::at("watch", &path))?,
            ended = writer.readable() => {
                ended.map_err(FileError::at("watch the writer of", &path))?.retain_ready();
                return log.print(args.timestamps);
            }
        }
        log.print(args.timestamps)?;
    }
}

fn log_of(container: &FoundContainer) -> Result<PathBuf, EverydayError> {
    let kept = container.bundle.join(LOG);
    match &container.log {
        Some(log) => Ok(log.clone()),
        None if kept.exists() => Ok(kept),
        None => {
            let instead = container.instead(ManagersVerb::Logs);
            Err(EverydayError::NoLog { id: container.id.clone(), instead })
        }
    }
}

/// A log, and how far it was read.
struct LogReader {
    path: PathBuf,
    file: BufReader<File>,
    /// The beginning of a line whose rest has not been written yet.
    rest: Vec<u8>,
}

impl LogReader {
    fn open(path: &Path) -> Result<Self, EverydayError> {
        let file = open_regular(path, Links::Refuse).map_err(FileError::at("open", path))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file), rest: Vec::new() })
    }

    /// The next complete line. None: the file has no further complete line yet.
    fn next(&mut self) -> Result<Option<Vec<u8>>, EverydayError> {
        let mut limited = io::Read::take(&mut self.file, MAX_LINE);
        limited.read_until(b'\n', &mut self.rest).map_err(FileError::at("read", &self.path))?;
        match self.rest.pop_if(|last| *last == b'\n') {
            Some(_) => Ok(Some(std::mem::take(&mut self.rest))),
            None if self.rest.len() as u64 >= MAX_LINE => {
                Err(EverydayError::NotALog { path: self.path.clone() })
            }
            None => Ok(self.next_file()?.then(|| self.next()).transpose()?.flatten()),
        }
    }

    /// A log that has become long is renamed, and begins anew.
    fn next_file(&mut self) -> Result<bool, EverydayError> {
        use std::os::unix::fs::MetadataExt as _;
        let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let Ok(current) = std::fs::symlink_metadata(&self.path).map(identity) else { return Ok(false) };
        let own = self.file.get_ref().metadata().map_err(FileError::at("look up", &self.path))?;
        if identity(own) == current {
            return Ok(false);
        }
        *self = Self::open(&self.path)?;
        Ok(true)
    }

    fn print(&mut self, timestamps: bool) -> Result<(), EverydayError> {
        while let Some(line) = self.next()? {
            print_line(&line, timestamps, &self.path)?;
        }
        Ok(())
    }

    fn print_last(&mut self, lines: usize, timestamps: bool) -> Result<(), EverydayError> {
        /// Most lines that are kept in memory.
        const MOST: usize = 100_000;
        let mut last = VecDeque::new();
        let mut complete = 0;
        while let Some(line) = self.next()? {
            complete += usize::from(!is_part(&line));
            last.push_back(line);
            while complete > lines.min(MOST) {
                complete -= last.pop_front().map_or(0, |line| usize::from(!is_part(&line)));
            }
        }
        last.iter().try_for_each(|line| print_line(line, timestamps, &self.path))
    }
}

fn is_part(line: &[u8]) -> bool {
    LogLine::parse(line).is_some_and(|line| line.is_part)
}

fn print_line(line: &[u8], timestamps: bool, path: &Path) -> Result<(), EverydayError> {
    let line = LogLine::parse(line).ok_or_else(|| EverydayError::NotALog { path: path.to_owned() })?;
    let mut text = Vec::new();
    if timestamps {
        text.extend_from_slice(format!("{} ", line.time).as_bytes());
    }
    text.extend_from_slice(line.text);
    // A part of a line is printed at once, since a prompt has no end.
    if !line.is_part {
        text.push(b'\n');
    }
    let written = match line.is_stderr {
        true => io::stderr().write_all(&text),
        false => io::stdout().write_all(&text).and_then(|()| io::stdout().flush()),
    };
    Ok(written.map_err(FileError::at("write to", "the terminal"))?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_log_is_read_line_by_line_and_across_its_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "t stdout F one\nt stdout F tw").unwrap();
        let mut log = LogReader::open(&path).unwrap();
        assert_eq!(log.next().unwrap().unwrap(), b"t stdout F one");
        assert_eq!(log.next().unwrap(), None);
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"o\n").unwrap();
        assert_eq!(log.next().unwrap().unwrap(), b"t stdout F two");
        fs::rename(&path, dir.path().join("log.1")).unwrap();
        assert_eq!(log.next().unwrap(), None);
        fs::write(&path, "t stderr F new\n").unwrap();
        assert_eq!(log.next().unwrap().unwrap(), b"t stderr F new");
    }

    #[test]
    fn what_is_no_log_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "hello\n").unwrap();
        assert!(matches!(LogReader::open(&path).unwrap().print(false), Err(EverydayError::NotALog { .. })));
        let container = find::example("c", None, None);
        assert!(matches!(log_of(&container), Err(EverydayError::NoLog { .. })));
    }
}
