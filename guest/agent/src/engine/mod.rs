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
//! Another process in a container needs less, and is the agent's own code (see `exec`): the zygote forks it, as the
//! agent's child too, into the container's pid namespace and cgroup. The process that serves a container's files to the host
//! (see `view`) is forked by the zygote as well.
//!
//! Forking a process that is ready costs a few milliseconds where executing a helper costs tens of them.
//! The report pipe stays open in the init until its command is executed: its end is "started".

mod devices;
mod exec;
mod executor;
mod home;
mod log;
mod namespaces;
mod process;
mod report;
mod shed;
mod spec;
mod tenancy;
mod terminal;
mod worker;
mod zygote;

use std::{
    fs,
    io::{self, IoSlice, Seek, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::PathBuf,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, MsgFlags, sendmsg},
        stat::Mode,
    },
    unistd::{Pid, pipe2},
};
use tokio::sync::oneshot;

pub(crate) use self::{
    namespaces::NamespaceError,
    report::Refusal,
    spec::{MountPoint, Prepared, SpecError},
    tenancy::{PreparedProcess, Tenancy},
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

/// A process that has executed its command.
#[derive(Debug)]
pub(crate) struct Executed {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<Exit>,
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
    #[error("cannot {what}: {text}")]
    Failed { what: &'static str, text: String },
    #[error("the container does not run")]
    NotRunning,
    #[error("cannot find out which namespaces the container has")]
    Namespaces(#[from] NamespaceError),
    #[error("cannot hold the container's init")]
    Hold(#[source] Errno),
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
        let expectation = reaper.expect();
        let mut reports = self.ask(&Request::Create(prepared.request().clone()), stdio.into_fds())?;
        let mut outcome = Outcome::new("create the container");
        let pid = follow(&mut reports, &expectation, &mut outcome).await?;
        let exit = expectation.watch(pid);
        Ok(Created { pid, exit, waiting: Waiting { notify_dir: prepared.notify_dir(), reports } })
    }

    /// Runs one more process in a container, whose init is `init`. Nothing of it is left when this fails.
    ///
    /// # Errors
    /// The container does not run, or the command cannot be executed.
    pub(crate) async fn exec(
        &self,
        reaper: &Reaper,
        init: Pid,
        tenancy: &Tenancy,
        process: &PreparedProcess,
        stdio: ProcessEnds,
    ) -> Result<Executed, EngineError> {
        let handle = reaper.hold(init).map_err(EngineError::Hold)?.ok_or(EngineError::NotRunning)?;
        let request = match tenancy.request(init, process) {
            Err(err) if err.is_gone() => return Err(EngineError::NotRunning),
            request => request?,
        };
        let file = process_file(&process.json).map_err(EngineError::Ask)?;
        let expectation = reaper.expect();
        let fds = [file, handle].into_iter().chain(stdio.into_fds()).collect();
        let mut reports = self.ask(&Request::Exec(request), fds)?;
        let mut outcome = Outcome::new("start the process");
        let pid = follow(&mut reports, &expectation, &mut outcome).await?;
        let exit = expectation.watch(pid);
        reports.executed(outcome).await?;
        Ok(Executed { pid, exit })
    }

    /// Forks a process that serves the files below `root` to whoever has the other end of `socket`.
    ///
    /// # Errors
    /// It cannot be forked.
    pub(crate) async fn serve_view(
        &self,
        reaper: &Reaper,
        root: OwnedFd,
        socket: OwnedFd,
    ) -> Result<Executed, EngineError> {
        let expectation = reaper.expect();
        let mut reports = self.ask(&Request::View, vec![root, socket])?;
        let mut outcome = Outcome::new("serve the container's files");
        match reports.next().await.map_err(EngineError::Reports)? {
            Some(Message::Worker { pid }) => {
                let pid = Pid::from_raw(pid);
                Ok(Executed { pid, exit: expectation.watch(pid) })
            }
            Some(Message::Failed { text }) => Err(outcome.failed(text)),
            _ => Err(outcome.died()),
        }
    }

    /// Sends a request, and gives the descriptors away: from here on only the engine's processes hold them.
    fn ask(&self, request: &Request, fds: Vec<OwnedFd>) -> Result<Reports, EngineError> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|err| EngineError::Pipe(err.into()))?;
        let reports = Reports::new(read).map_err(EngineError::Pipe)?;
        let text = serde_json::to_vec(request).map_err(|err| EngineError::Ask(err.into()))?;
        let fds: Vec<OwnedFd> = [write].into_iter().chain(fds).collect();
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.zygote.as_raw_fd(), &[IoSlice::new(&text)], &control, flags, None)
            .map_err(|err| EngineError::Ask(err.into()))?;
        Ok(reports)
    }
}

/// A file in memory, at its start.
fn process_file(json: &[u8]) -> io::Result<OwnedFd> {
    let mut file = fs::File::from(memfd_create(c"process", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(json)?;
    file.rewind()?;
    Ok(file.into())
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
async fn follow(
    reports: &mut Reports,
    expectation: &Expectation,
    outcome: &mut Outcome,
) -> Result<Pid, EngineError> {
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

/// What is known when something fails.
#[derive(Debug)]
struct Outcome {
    what: &'static str,
    refused: Option<(Refusal, String)>,
    /// The innermost error comes first, and is the one that names the thing.
    first_log: Option<String>,
}

impl Outcome {
    fn new(what: &'static str) -> Self {
        Self { what, refused: None, first_log: None }
    }

    fn log(&mut self, text: String) {
        self.first_log.get_or_insert(text);
    }

    fn failed(&mut self, text: String) -> EngineError {
        match (self.refused.take(), self.first_log.take()) {
            (Some((refusal, text)), _) => EngineError::Refused { refusal, text },
            (None, Some(log)) if !text.contains(&log) => {
                EngineError::Failed { what: self.what, text: format!("{text}: {log}") }
            }
            (None, _) => EngineError::Failed { what: self.what, text },
        }
    }

    fn died(&mut self) -> EngineError {
        EngineError::Died { log: self.first_log.take().map(|log| format!(": {log}")).unwrap_or_default() }
    }
}

impl Reports {
    /// Reads until the command is executed, which closes the pipe.
    async fn executed(&mut self, mut outcome: Outcome) -> Result<(), EngineError> {
        while let Some(message) = self.next().await.map_err(EngineError::Reports)? {
            match message {
                Message::Refused { refusal, text } => outcome.refused = Some((refusal, text)),
                Message::Failed { text } => return Err(outcome.failed(text)),
                Message::Log { text } => outcome.log(text),
                Message::Worker { .. } | Message::Created { .. } => {}
            }
        }
        match outcome.refused {
            None => Ok(()),
            Some((refusal, text)) => Err(EngineError::Refused { refusal, text }),
        }
    }
}

impl Waiting {
    /// Lets the init execute its command, and returns when it has.
    ///
    /// # Errors
    /// The init is gone, or the command cannot be executed.
    pub(crate) async fn start(mut self) -> Result<(), EngineError> {
        self.notify().map_err(EngineError::NotWaiting)?;
        self.reports.executed(Outcome::new("start the container")).await
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
