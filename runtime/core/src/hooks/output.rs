//! Reads what a hook prints on its standard error, without waiting for processes that the hook leaves behind.

use std::io;

use machinen_base::text::{MAX_SHOWN, printable};
use machinen_protocol::tail::OutputTail;
use tokio::{io::AsyncReadExt as _, net::unix::pipe};

/// The standard error of a hook, of which the last part is kept.
#[derive(Debug)]
pub(super) struct HookErrors {
    pipe: pipe::Receiver,
    tail: OutputTail,
}

impl HookErrors {
    pub(super) fn new(pipe: pipe::Receiver) -> Self {
        // With room for the mark of a text that was cut.
        Self { pipe, tail: OutputTail::new(MAX_SHOWN - 16) }
    }

    /// Reads all that is written. Returns only an error of read(2): a process that the hook has left behind may keep the
    /// pipe open, so the end of the pipe means nothing.
    pub(super) async fn follow(&mut self) -> io::Error {
        let mut buffer = [0; MAX_SHOWN];
        loop {
            match self.pipe.read(&mut buffer).await {
                Ok(0) => return std::future::pending().await,
                Ok(length) => self.tail.push(&buffer[..length]),
                Err(error) => return error,
            }
        }
    }

    /// Reads what is in the pipe by now, but no more than a pipe can hold. Returns the last part of it in one line, fit
    /// to be shown.
    pub(super) fn finish(mut self) -> String {
        const MOST_READS: usize = 1 << 10;
        let mut buffer = [0; MAX_SHOWN];
        for _ in 0..MOST_READS {
            match nix::unistd::read(&self.pipe, &mut buffer) {
                Ok(length) if length > 0 => self.tail.push(&buffer[..length]),
                _ => break,
            }
        }
        printable(&self.tail.text())
    }
}
