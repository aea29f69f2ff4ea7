//! The reports of workers and inits to the agent: one JSON object per line, through a pipe.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use tokio::net::unix::pipe;

/// Below PIPE_BUF even with all characters escaped, so that lines of several processes never mix (pipe(7)).
const MAX_TEXT: usize = 600;
/// Most bytes that are kept of an unfinished line.
const MAX_LINE: usize = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Report {
    /// The worker runs.
    Worker { pid: i32 },
    /// Details of an error.
    Log { text: String },
    /// The request is refused for a reason that has an error kind of its own.
    Refused { refusal: Refusal, text: String },
    /// The request has failed.
    Failed { text: String },
    /// The container's init waits, or the added process exists.
    Created { pid: i32 },
    /// The file system is shown with other owners.
    Mapped,
    /// Later processes begin in another network namespace.
    Entered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    /// The spec is invalid.
    Spec,
    /// The command does not exist.
    NotFound,
    /// The command exists, but its user may not execute it.
    NotExecutable,
}

/// The writing end, shared within one process.
#[derive(Debug, Clone)]
pub(super) struct Reporter {
    pipe: Arc<File>,
}

impl Reporter {
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Arc::new(pipe.into()) }
    }

    /// Sends a report. An error means that the agent does not read any more, and is ignored.
    pub(super) fn send(&self, mut report: Report) {
        if let Report::Log { text } | Report::Refused { text, .. } | Report::Failed { text } = &mut report
            && text.chars().count() > MAX_TEXT
        {
            *text = shortened(text);
        }
        let Ok(mut line) = serde_json::to_vec(&report) else { return };
        line.push(b'\n');
        let _ = (&*self.pipe).write_all(&line);
    }
}

/// Keeps both ends of a text: it begins with the thing that it is about, such as a path, and ends with the
/// cause.
fn shortened(text: &str) -> String {
    const GAP: &str = "...";
    let head = MAX_TEXT / 2;
    let skipped = text.chars().count() - (MAX_TEXT - head - GAP.len());
    text.chars().take(head).chain(GAP.chars()).chain(text.chars().skip(skipped)).collect()
}

/// The reading end, in the agent.
#[derive(Debug)]
pub(super) struct Reports {
    pipe: pipe::Receiver,
    bytes: Vec<u8>,
    reports: VecDeque<Report>,
}

impl Reports {
    pub(super) fn new(pipe: OwnedFd) -> io::Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(pipe)?;
        Ok(Self { pipe, bytes: Vec::new(), reports: VecDeque::new() })
    }

    /// Waits for the next report; None when every writer has ended or executed its command.
    pub(super) async fn next(&mut self) -> io::Result<Option<Report>> {
        loop {
            if let Some(report) = self.reports.pop_front() {
                return Ok(Some(report));
            }
            self.pipe.readable().await?;
            let mut buffer = [0; 4096];
            match self.pipe.try_read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(length) => self.take(&buffer[..length])?,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
            }
        }
    }

    /// The next report that is in the pipe by now; None without one.
    pub(super) fn remaining(&mut self) -> io::Result<Option<Report>> {
        loop {
            if let Some(report) = self.reports.pop_front() {
                return Ok(Some(report));
            }
            let mut buffer = [0; 4096];
            // Read directly: the runtime may not have noticed the last bytes yet.
            match nix::unistd::read(self.pipe.as_fd(), &mut buffer) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(None),
                Ok(length) => self.take(&buffer[..length])?,
                Err(err) => return Err(err.into()),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            self.reports.push_back(serde_json::from_slice(&line)?);
        }
        if self.bytes.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    #[tokio::test]
    async fn messages_arrive_in_order_and_end_with_the_last_writer() {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut reports = Reports::new(read).unwrap();
        let reporter = Reporter::new(write);
        reporter.send(Report::Worker { pid: 7 });
        reporter.send(Report::Log { text: "\u{e4}\n".repeat(MAX_TEXT) });
        assert!(matches!(reports.next().await.unwrap(), Some(Report::Worker { pid: 7 })));
        let Some(Report::Log { text }) = reports.next().await.unwrap() else { panic!("not a log") };
        assert_eq!(text.chars().count(), MAX_TEXT);
        assert!(text.starts_with('\u{e4}') && text.contains("...") && text.ends_with('\n'));
        assert!(reports.remaining().unwrap().is_none(), "the pipe is empty, but a writer exists");
        drop(reporter);
        assert!(reports.next().await.unwrap().is_none());
    }
}
