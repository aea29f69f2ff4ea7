//! What workers and inits tell the agent: one JSON object a line, through a pipe.

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

/// Below PIPE_BUF with all escapes, so that lines of several processes never mix (pipe(7)).
const MAX_TEXT: usize = 600;
/// The most that is kept of a line that does not end.
const MAX_LINE: usize = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// The worker is there.
    Worker { pid: i32 },
    /// An error on the way, with its details.
    Log { text: String },
    /// The container cannot be made for a reason that has a status of its own.
    Refused { refusal: Refusal, text: String },
    /// The container cannot be made.
    Failed { text: String },
    /// The container's init waits.
    Created { pid: i32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    /// The spec asks for something that cannot be.
    Spec,
    /// There is no such command.
    NotFound,
    /// The command is there, but not executable for its user.
    NotExecutable,
}

/// The writing end, shared by everything in one process.
#[derive(Debug, Clone)]
pub(super) struct Reporter {
    pipe: Arc<File>,
}

impl Reporter {
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Arc::new(pipe.into()) }
    }

    /// An agent that does not listen any more needs no report.
    pub(super) fn send(&self, mut message: Message) {
        if let Message::Log { text } | Message::Refused { text, .. } | Message::Failed { text } = &mut message
            && text.chars().count() > MAX_TEXT
        {
            *text = shortened(text);
        }
        let Ok(mut line) = serde_json::to_vec(&message) else { return };
        line.push(b'\n');
        let _ = (&*self.pipe).write_all(&line);
    }
}

/// Both ends of a text: it begins with what it is about, such as a path, and ends with what is wrong with it.
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
    messages: VecDeque<Message>,
}

impl Reports {
    pub(super) fn new(pipe: OwnedFd) -> io::Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(pipe)?;
        Ok(Self { pipe, bytes: Vec::new(), messages: VecDeque::new() })
    }

    /// The next message; None when every writer is gone or has executed its command.
    pub(super) async fn next(&mut self) -> io::Result<Option<Message>> {
        loop {
            if let Some(message) = self.messages.pop_front() {
                return Ok(Some(message));
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

    /// The next message that is in the pipe now; None when there is none.
    pub(super) fn last_words(&mut self) -> io::Result<Option<Message>> {
        loop {
            if let Some(message) = self.messages.pop_front() {
                return Ok(Some(message));
            }
            let mut buffer = [0; 4096];
            // Asks the kernel itself: the runtime may not have heard yet of what came last.
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
            self.messages.push_back(serde_json::from_slice(&line)?);
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
        reporter.send(Message::Worker { pid: 7 });
        reporter.send(Message::Log { text: "\u{e4}\n".repeat(MAX_TEXT) });
        assert!(matches!(reports.next().await.unwrap(), Some(Message::Worker { pid: 7 })));
        let Some(Message::Log { text }) = reports.next().await.unwrap() else { panic!("not a log") };
        assert_eq!(text.chars().count(), MAX_TEXT);
        assert!(text.starts_with('\u{e4}') && text.contains("...") && text.ends_with('\n'));
        assert!(reports.last_words().unwrap().is_none(), "nothing is there, but a writer is");
        drop(reporter);
        assert!(reports.next().await.unwrap().is_none());
    }
}
