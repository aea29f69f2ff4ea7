//! What makes containers. Nothing outside of this module knows how.
//!
//! The engine is youki's libcontainer. It forks, changes directories, enters namespaces and gives up privileges of
//! the process that it runs in, and it makes siblings of that process, which pid 1 cannot have. So it runs in
//! workers that are forked for one creation each:
//!
//! ```text
//!   agent (pid 1, asynchronous) ── request, stdio, report pipe ──> zygote (forked at boot, single-threaded)
//!     │  ^                                                           └─ fork, as the agent's child ──> worker
//!     │  └──────────── report: worker's pid, log, init's pid ────────────────────────────────────────────┤
//!     ├─ reaps all of them                                                                               │
//!     └─ notify socket: start ──> init (waits, then executes the command) <── clones, as the agent's child ┘
//! ```
//! Forking a process that is ready costs a few milliseconds where executing a helper costs tens of them.
//! The report pipe stays open in the init until its command is executed: its end is "started".

mod devices;
mod executor;
mod home;
mod log;
mod report;
mod spec;
mod worker;
mod zygote;

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::PathBuf,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
    },
    unistd::{Pid, pipe2},
};
use tokio::sync::oneshot;

pub(crate) use self::{
    report::Refusal,
    spec::{Prepared, SpecError},
};
use self::{
    report::{Message, Reports},
    zygote::Request,
};
use crate::{
    reaper::{Exit, Expectation, Reaper},
    stdio::ProcessEnds,
};

/// Directory of the engine's own files, in that of a container.
pub(crate) const DIR: &str = "engine";

/// The way to the zygote.
#[derive(Debug)]
pub(crate) struct Engine {
    zygote: OwnedFd,
}

/// A container whose init waits to be started.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<Exit>,
    pub(crate) waiting: Waiting,
}

/// What lets a waiting init go.
#[derive(Debug)]
pub(crate) struct Waiting {
    notify_dir: PathBuf,
    reports: Reports,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error("cannot fork the engine's process")]
    Fork(#[source] Errno),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("cannot ask the engine's process")]
    Ask(#[source] io::Error),
    #[error("cannot make a pipe for the engine's reports")]
    Pipe(#[source] io::Error),
    #[error("cannot read the engine's reports")]
    Reports(#[source] io::Error),
    /// The words for commands that cannot be executed are those that callers of OCI runtimes look for.
    #[error("{text}")]
    Refused { refusal: Refusal, text: String },
    #[error("cannot create the container: {text}")]
    Failed { text: String },
    #[error("the engine's process has ended without an answer{log}")]
    Died { log: String },
    #[error("cannot reach the container's init: it has ended, or was started before")]
    NotWaiting(#[source] io::Error),
}

impl Engine {
    /// Forks the zygote. To be called before this process has a second thread.
    ///
    /// # Errors
    /// Those of fork(2) and socketpair(2).
    pub(crate) fn fork() -> Result<Self, EngineError> {
        zygote::fork().map(|zygote| Self { zygote }).map_err(EngineError::Fork)
    }

    /// Makes a container. When this fails, the engine has removed what it had made, its processes and cgroup
    /// possibly excepted.
    ///
    /// # Errors
    /// The spec, or the file system that it refers to, cannot be made into a container.
    pub(crate) async fn create(
        &self,
        reaper: &Reaper,
        prepared: &Prepared,
        stdio: ProcessEnds,
    ) -> Result<Created, EngineError> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|err| EngineError::Pipe(err.into()))?;
        let mut reports = Reports::new(read).map_err(EngineError::Pipe)?;
        let expectation = reaper.expect();
        self.ask(prepared.request(), &write, &stdio).map_err(|err| EngineError::Ask(err.into()))?;
        // From here on only the worker and its children hold them.
        drop((write, stdio));
        let pid = follow(&mut reports, &expectation).await?;
        let exit = expectation.watch(pid);
        Ok(Created { pid, exit, waiting: Waiting { notify_dir: prepared.notify_dir(), reports } })
    }

    fn ask(&self, request: &Request, report: &OwnedFd, stdio: &ProcessEnds) -> Result<(), Errno> {
        let text = serde_json::to_vec(request).map_err(|_| Errno::EINVAL)?;
        let [stdin, stdout, stderr] = &stdio.0;
        let fds = [report, stdin, stdout, stderr].map(AsRawFd::as_raw_fd);
        let control = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.zygote.as_raw_fd(), &[IoSlice::new(&text)], &control, flags, None).map(drop)
    }
}

/// What is known of the worker while its reports are read.
#[derive(Debug)]
enum Worker {
    Unknown,
    Running(oneshot::Receiver<Exit>),
    /// It may have left children behind that keep the pipe open: what counts is what is in it.
    Ended,
}

/// Reads reports until the container is there or will not be.
async fn follow(reports: &mut Reports, expectation: &Expectation) -> Result<Pid, EngineError> {
    let mut outcome = Outcome::default();
    let mut worker = Worker::Unknown;
    loop {
        let message = match &mut worker {
            Worker::Unknown => reports.next().await,
            Worker::Running(exit) => tokio::select! {
                biased;
                message = reports.next() => message,
                _ = exit => {
                    worker = Worker::Ended;
                    continue;
                }
            },
            Worker::Ended => reports.last_words(),
        };
        match message.map_err(EngineError::Reports)? {
            Some(Message::Worker { pid }) => {
                worker = Worker::Running(expectation.watch(Pid::from_raw(pid)));
            }
            Some(Message::Created { pid }) => return Ok(Pid::from_raw(pid)),
            Some(Message::Log { text }) => outcome.log(text),
            Some(Message::Refused { refusal, text }) => outcome.refused = Some((refusal, text)),
            Some(Message::Failed { text }) => return Err(outcome.failed(text)),
            None => return Err(outcome.died()),
        }
    }
}

/// What is known when a creation fails.
#[derive(Debug, Default)]
struct Outcome {
    refused: Option<(Refusal, String)>,
    /// The innermost error comes first, and is the one that names the thing.
    first_log: Option<String>,
}

impl Outcome {
    fn log(&mut self, text: String) {
        self.first_log.get_or_insert(text);
    }

    fn failed(self, text: String) -> EngineError {
        match (self.refused, self.first_log) {
            (Some((refusal, text)), _) => EngineError::Refused { refusal, text },
            (None, Some(log)) if !text.contains(&log) => {
                EngineError::Failed { text: format!("{text}: {log}") }
            }
            (None, _) => EngineError::Failed { text },
        }
    }

    fn died(self) -> EngineError {
        EngineError::Died { log: self.first_log.map(|log| format!(": {log}")).unwrap_or_default() }
    }
}

impl Waiting {
    /// Lets the init execute its command, and returns when it has.
    ///
    /// # Errors
    /// The init is gone, or the command cannot be executed.
    pub(crate) async fn start(mut self) -> Result<(), EngineError> {
        self.notify().map_err(EngineError::NotWaiting)?;
        while let Some(message) = self.reports.next().await.map_err(EngineError::Reports)? {
            if let Message::Refused { refusal, text } = message {
                return Err(EngineError::Refused { refusal, text });
            }
        }
        Ok(())
    }

    fn notify(&self) -> io::Result<()> {
        // The address of a socket has 108 bytes at most, which a long container id exceeds: the way through
        // /proc is short. The listener was there before the init, so this never waits.
        let dir =
            open(&self.notify_dir, OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY, Mode::empty())?;
        let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), libcontainer::notify_socket::NOTIFY_FILE);
        // Closing the connection is the signal.
        StdUnixStream::connect(path).map(drop)
    }
}
