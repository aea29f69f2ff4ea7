//! Logging programs, which `nerdctl run -d` always uses.
//!
//! ```text
//!   machinen ── fd 3: stdout ──> program (args: the URI's query; env: CONTAINER_ID, CONTAINER_NAMESPACE)
//!            ── fd 4: stderr ──>
//!            <── fd 5: ready ───  closed, or a byte
//! ```
//! The program ends after its streams have ended. machinen reaps it, and kills it if it does not end.

use std::{io, os::fd::OwnedFd, time::Duration};

use machinen_base::process::{Child, Spawn};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::{StdioError, StreamOwner, uri::LoggerProgram};

/// Longest time until the program is ready.
const READY: Duration = Duration::from_secs(30);
/// Longest time from the end of the streams to the end of the program; containerd allows the same.
const GRACE: Duration = Duration::from_secs(12);

/// A running logging program.
#[derive(Debug)]
pub struct Logger {
    child: Child,
    ready: pipe::Receiver,
    must_report: bool,
}

/// The writing ends of the program's streams.
#[derive(Debug)]
pub(super) struct LoggerEnds {
    pub(super) stdout: pipe::Sender,
    pub(super) stderr: pipe::Sender,
}

impl Logger {
    /// Starts the program, without waiting until it is ready.
    ///
    /// # Errors
    /// The program cannot be started.
    pub(super) fn start(
        program: &LoggerProgram,
        owner: &StreamOwner,
    ) -> Result<(Self, LoggerEnds), StdioError> {
        let (their_stdout, stdout) = pipe()?;
        let (their_stderr, stderr) = pipe()?;
        let (ready, their_ready) = pipe()?;
        let child = Spawn::new(&program.path)
            .args(&program.args)
            .clear_env()
            .env("CONTAINER_ID", &owner.id)
            .env("CONTAINER_NAMESPACE", &owner.namespace)
            .fd(their_stdout, 3)
            .fd(their_stderr, 4)
            .fd(their_ready, 5)
            .start()
            .map_err(StdioError::Logger)?;
        let sender = |end| pipe::Sender::from_owned_fd(end).map_err(StdioError::Pipe);
        let ends = LoggerEnds { stdout: sender(stdout)?, stderr: sender(stderr)? };
        let ready = pipe::Receiver::from_owned_fd(ready).map_err(StdioError::Pipe)?;
        Ok((Self { child, ready, must_report: program.must_report }, ends))
    }

    /// Waits until the program is ready.
    ///
    /// # Errors
    /// The program does not become ready in time, or ends without reporting it where that is required.
    pub async fn ready(&mut self) -> Result<(), StdioError> {
        let program = || self.child.program().to_owned();
        match timeout(READY, self.ready.read(&mut [0])).await {
            Err(_) => Err(StdioError::LoggerNotReady { program: program(), limit: READY }),
            Ok(Err(error)) => Err(StdioError::Pipe(error)),
            Ok(Ok(0)) if self.must_report => Err(StdioError::LoggerSilent { program: program() }),
            Ok(Ok(_)) => Ok(()),
        }
    }

    /// Waits for the end of the program, which follows the end of its streams, and reaps it.
    pub async fn finish(self) {
        let program = self.child.program().to_owned();
        match timeout(GRACE, self.child.exited()).await {
            Ok(exit) if exit.success() => {}
            Ok(exit) => tracing::warn!("logging program {program} {exit}"),
            Err(_) => {
                tracing::warn!("logging program {program} is killed {GRACE:?} after the end of its streams");
                if let Err(error) = self.child.kill().await {
                    tracing::error!("cannot end a logging program: {error}");
                }
            }
        }
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), StdioError> {
    let (reader, writer) = io::pipe().map_err(StdioError::Pipe)?;
    Ok((reader.into(), writer.into()))
}
