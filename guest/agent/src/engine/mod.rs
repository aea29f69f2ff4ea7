//! Makes containers. Only this module knows how.
//!
//! The engine is youki's libcontainer. It forks, changes directories, enters namespaces and gives up
//! privileges of the process in which it runs, and it creates siblings of that process, which pid 1 cannot
//! have. So it runs in workers, each forked for one creation:
//!
//! ```text
//!   agent (pid 1, asynchronous) ── request, stdio, report pipe ──> zygote (forked at boot, single-threaded)
//!     │  ^                                                           └─ fork, as the agent's child ──> worker
//!     │  └──────────── report: worker's pid, log, init's pid ────────────────────────────────────────────┤
//!     ├─ reaps all of them                                                                               │
//!     └─ notify socket: start ──> init (waits, then executes the command) <── clones, as the agent's child ┘
//! ```
//! An additional process in a container needs less, and is the agent's own code (see `exec`): the zygote
//! forks it, also as the agent's child, into the container's pid namespace and cgroup. The zygote also forks
//! the process that serves a container's files to the host (see `view`), and those that show a file system with other
//! owners (see `mapping`).
//!
//! Forking a ready process costs a few milliseconds, executing a helper tens of them. The report pipe stays
//! open in the init until its command is executed: the end of the pipe means "started".

mod devices;
mod exec;
mod executor;
mod hooks;
mod inherited;
mod join;
mod log;
mod mapping;
mod mounts;
mod namespaces;
mod oci;
mod passwd;
mod process;
mod report;
mod request;
mod seccomp;
mod spec;
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
    path::{Path, PathBuf},
};

use machinen_protocol::error::{ErrorKind, HasKind};
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
use pathrs::flags::OpenFlags;
use tokio::sync::oneshot;

pub(crate) use self::{
    devices::usual_program,
    hooks::PreparedHook,
    join::{ContainerContext, PreparedProcess},
    mapping::IdMaps,
    mounts::{FileMount, MountPoint, PointInVolume},
    namespaces::NamespaceError,
    oci::SpecError,
    report::Refusal,
    spec::{DIR, Prepared},
    zygote::EntryPoints,
};
use self::{
    mapping::MapRequest,
    report::{Report, Reports},
    request::ZygoteRequest,
};
use crate::{
    reaper::{Expectation, Reaper},
    stdio::ProcessEnds,
    sys::WaitStatus,
};

/// Makes what this process, and those that it forks, would make for their first container otherwise: the file system of
/// processes through which files are opened by their descriptors.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn warm_up() -> Result<(), pathrs::error::Error> {
    pathrs::Root::open("/")?.resolve("/")?.reopen(OpenFlags::O_PATH).map(drop)
}

/// The connection to the zygote.
#[derive(Debug)]
pub(crate) struct Engine {
    zygote: OwnedFd,
}

/// A container whose init waits to be started.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<WaitStatus>,
    pub(crate) waiting: WaitingInit,
}

/// A process that has executed its command.
#[derive(Debug)]
pub(crate) struct Executed {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<WaitStatus>,
}

/// An init that waits for the signal to execute its command.
#[derive(Debug)]
pub(crate) struct WaitingInit {
    notify_dir: PathBuf,
    reports: Reports,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error("cannot fork the engine's process")]
    Fork(#[source] Errno),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("cannot send a request to the engine's process")]
    Send(#[source] io::Error),
    #[error("cannot make a pipe for the engine's reports")]
    Pipe(#[source] io::Error),
    #[error("cannot read the engine's reports")]
    Reports(#[source] io::Error),
    /// Callers of OCI runtimes recognise commands that cannot be executed by these texts.
    #[error("{text}")]
    Refused { refusal: Refusal, text: String },
    #[error("cannot {what}: {text}")]
    Failed { what: &'static str, text: String },
    #[error("cannot keep the network namespace open")]
    Namespace(#[source] io::Error),
    #[error("the container does not run")]
    NotRunning,
    #[error("cannot examine the container's namespaces")]
    Namespaces(#[from] NamespaceError),
    #[error("cannot open the container's init")]
    OpenInit(#[source] Errno),
    #[error("the engine's process has ended without a report{log}")]
    Died { log: String },
    #[error("cannot reach the container's init: it has ended, or was started before")]
    NotWaiting(#[source] io::Error),
}

impl HasKind for EngineError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Spec(_) | Self::Refused { refusal: Refusal::Spec, .. } => ErrorKind::InvalidArgument,
            Self::NotRunning => ErrorKind::FailedPrecondition,
            Self::Refused { refusal: Refusal::NotFound, .. } => ErrorKind::NotFound,
            Self::Refused { refusal: Refusal::NotExecutable, .. } => ErrorKind::PermissionDenied,
            _ => ErrorKind::Internal,
        }
    }
}

impl Engine {
    /// Forks the zygote. To be called before this process has a second thread.
    ///
    /// # Errors
    /// Those of fork(2) and socketpair(2).
    pub(crate) fn fork(entry_points: EntryPoints) -> Result<Self, EngineError> {
        zygote::fork(entry_points).map(|zygote| Self { zygote }).map_err(EngineError::Fork)
    }

    /// Creates a container. A failed creation has removed everything that it had made, except possibly
    /// processes and the cgroup.
    ///
    /// # Errors
    /// The spec is invalid, or refers to something that the file system does not have.
    pub(crate) async fn create(
        &self,
        reaper: &Reaper,
        prepared: &Prepared,
        stdio: ProcessEnds,
    ) -> Result<Created, EngineError> {
        let expectation = reaper.expect();
        let mut reports = self.send(&ZygoteRequest::Create(prepared.request().clone()), stdio.into_fds())?;
        let mut failure = FailureLog::new("create the container");
        let pid = follow(&mut reports, &expectation, &mut failure).await?;
        let exit = expectation.watch(pid);
        Ok(Created { pid, exit, waiting: WaitingInit { notify_dir: prepared.notify_dir(), reports } })
    }

    /// Runs one more process in the container whose init is `init`. A failed call leaves nothing behind.
    ///
    /// # Errors
    /// The container does not run, or the command cannot be executed.
    pub(crate) async fn exec(
        &self,
        reaper: &Reaper,
        init: Pid,
        join_context: &ContainerContext,
        process: &PreparedProcess,
        stdio: ProcessEnds,
    ) -> Result<Executed, EngineError> {
        let handle = reaper.open(init).map_err(EngineError::OpenInit)?.ok_or(EngineError::NotRunning)?;
        let request = match join_context.request(init, process) {
            Err(err) if err.is_gone() => return Err(EngineError::NotRunning),
            request => request?,
        };
        let file = process_file(&process.json).map_err(EngineError::Send)?;
        let expectation = reaper.expect();
        let fds = [file, handle].into_iter().chain(stdio.into_fds()).collect();
        let mut reports = self.send(&ZygoteRequest::Exec(request), fds)?;
        let mut failure = FailureLog::new("start the process");
        let pid = follow(&mut reports, &expectation, &mut failure).await?;
        let exit = expectation.watch(pid);
        reports.executed(failure).await?;
        Ok(Executed { pid, exit })
    }

    /// Forks a process that serves the files below `root` to the other end of `socket`.
    ///
    /// # Errors
    /// The process cannot be forked.
    pub(crate) async fn serve_view(
        &self,
        reaper: &Reaper,
        root: OwnedFd,
        socket: OwnedFd,
    ) -> Result<Executed, EngineError> {
        let expectation = reaper.expect();
        let mut reports = self.send(&ZygoteRequest::View, vec![root, socket])?;
        let mut failure = FailureLog::new("serve the container's files");
        match reports.next().await.map_err(EngineError::Reports)? {
            Some(Report::Worker { pid }) => {
                let pid = Pid::from_raw(pid);
                Ok(Executed { pid, exit: expectation.watch(pid) })
            }
            Some(Report::Failed { text }) => Err(failure.failed(text)),
            _ => Err(failure.died()),
        }
    }

    /// Mounts the file system that is at `source` at `target` too, where its files belong to the users that these ids
    /// stand for outside of their user namespace.
    ///
    /// # Errors
    /// The kernel refuses the ids, or the file system has no such mounts.
    pub(crate) async fn map_owners(
        &self,
        source: &Path,
        target: &Path,
        ids: &IdMaps,
    ) -> Result<(), EngineError> {
        let (source, target) = (source.to_owned(), target.to_owned());
        let request = MapRequest { source, target, ids: ids.clone() };
        let mut reports = self.send(&ZygoteRequest::MapOwners(request), Vec::new())?;
        let mut failure = FailureLog::new("map the users of the root file system");
        loop {
            match reports.next().await.map_err(EngineError::Reports)? {
                Some(Report::Worker { .. }) => {}
                Some(Report::Mapped) => return Ok(()),
                Some(Report::Failed { text }) => return Err(failure.failed(text)),
                _ => return Err(failure.died()),
            }
        }
    }

    /// Has all later processes begin in this network namespace.
    ///
    /// # Errors
    /// The kernel refuses. Later processes begin where they would have begun then.
    pub(crate) async fn enter_network(&self, namespace: OwnedFd) -> Result<(), EngineError> {
        let mut reports = self.send(&ZygoteRequest::EnterNetwork, vec![namespace])?;
        let mut failure = FailureLog::new("enter the network namespace");
        match reports.next().await.map_err(EngineError::Reports)? {
            Some(Report::Entered) => Ok(()),
            Some(Report::Failed { text }) => Err(failure.failed(text)),
            _ => Err(failure.died()),
        }
    }

    /// Sends a request and its descriptors, which are closed here: afterwards only the engine's processes
    /// hold them.
    fn send(&self, request: &ZygoteRequest, fds: Vec<OwnedFd>) -> Result<Reports, EngineError> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|err| EngineError::Pipe(err.into()))?;
        let reports = Reports::new(read).map_err(EngineError::Pipe)?;
        let text = serde_json::to_vec(request).map_err(|err| EngineError::Send(err.into()))?;
        let fds: Vec<OwnedFd> = [write].into_iter().chain(fds).collect();
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&numbers)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.zygote.as_raw_fd(), &[IoSlice::new(&text)], &control, flags, None)
            .map_err(|err| EngineError::Send(err.into()))?;
        Ok(reports)
    }
}

/// A file in memory, positioned at its start.
fn process_file(json: &[u8]) -> io::Result<OwnedFd> {
    let mut file = fs::File::from(memfd_create(c"process", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(json)?;
    file.rewind()?;
    Ok(file.into())
}

/// What the agent knows of the worker while it reads reports.
#[derive(Debug)]
enum Worker {
    Unknown,
    Running(oneshot::Receiver<WaitStatus>),
    /// Its children may keep the pipe open: only the reports that are in the pipe by now count.
    Ended,
}

/// Reads reports until the container exists or has failed.
async fn follow(
    reports: &mut Reports,
    expectation: &Expectation,
    failure: &mut FailureLog,
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
            Worker::Ended => reports.remaining(),
        };
        match message.map_err(EngineError::Reports)? {
            Some(Report::Worker { pid }) => {
                worker = Worker::Running(expectation.watch(Pid::from_raw(pid)));
            }
            Some(Report::Created { pid }) => return Ok(Pid::from_raw(pid)),
            Some(Report::Log { text }) => failure.log(text),
            Some(Report::Refused { refusal, text }) => failure.refused = Some((refusal, text)),
            Some(Report::Failed { text }) => return Err(failure.failed(text)),
            Some(Report::Mapped | Report::Entered) | None => return Err(failure.died()),
        }
    }
}

/// What the reports have shown of a failure so far.
#[derive(Debug)]
struct FailureLog {
    what: &'static str,
    refused: Option<(Refusal, String)>,
    /// The first error is the innermost one, which names the thing that failed.
    first_log: Option<String>,
}

impl FailureLog {
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
    /// Reads reports until the command is executed, which closes the pipe.
    async fn executed(&mut self, mut failure: FailureLog) -> Result<(), EngineError> {
        while let Some(message) = self.next().await.map_err(EngineError::Reports)? {
            match message {
                Report::Refused { refusal, text } => failure.refused = Some((refusal, text)),
                Report::Failed { text } => return Err(failure.failed(text)),
                Report::Log { text } => failure.log(text),
                Report::Worker { .. } | Report::Created { .. } | Report::Mapped | Report::Entered => {}
            }
        }
        match failure.refused {
            None => Ok(()),
            Some((refusal, text)) => Err(EngineError::Refused { refusal, text }),
        }
    }
}

impl WaitingInit {
    /// Has the init execute its command, and returns when it has.
    ///
    /// # Errors
    /// The init is gone, or the command cannot be executed.
    pub(crate) async fn start(mut self) -> Result<(), EngineError> {
        self.notify().map_err(EngineError::NotWaiting)?;
        self.reports.executed(FailureLog::new("start the container")).await
    }

    fn notify(&self) -> io::Result<()> {
        // The address of a socket has at most 108 bytes, which a long container id exceeds: the path through
        // /proc is short. The listener exists since before the init, so this never blocks.
        let dir =
            open(&self.notify_dir, OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_DIRECTORY, Mode::empty())?;
        let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), libcontainer::notify_socket::NOTIFY_FILE);
        // Closing the connection is the signal.
        StdUnixStream::connect(path).map(drop)
    }
}
