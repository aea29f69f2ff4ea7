//! Serves a container's root file system to the host, which shows it as `/proc/PID/root` of the container's
//! anchor.
//!
//! ```text
//!   host ── raw stream ── Relay (a task of the agent) ── socket ── server (a separate process) ── files
//! ```
//! The server is started when the host asks for the files, so most containers have none.

mod attributes;
mod filesystem;
mod nodes;
mod relay;
mod server;
mod tree;

use std::{io, os::fd::OwnedFd, path::Path, time::Duration};

use machinen_protocol::error::{ErrorKind, HasKind};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        signal::Signal,
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        stat::Mode,
    },
    unistd::Pid,
};
use tokio::{
    sync::{Mutex, oneshot},
    task::AbortHandle,
    time::timeout,
};

use crate::{
    channel::Stream,
    console,
    engine::{Engine, EngineError},
    reaper::Reaper,
    sys::WaitStatus,
};
use relay::{Relay, WriteGate};
pub(crate) use server::serve;

/// How long a pause waits for a change in progress.
const CHANGE_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    #[error("the container does not run")]
    NotRunning,
    #[error("cannot open the container's root")]
    Root(#[source] Errno),
    #[error("cannot make a socket for the server of the container's files")]
    Socket(#[source] Errno),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot talk to the server of the container's files")]
    Server(#[source] io::Error),
    #[error("a change that the host makes to the container's files has not ended within {} s", CHANGE_DEADLINE.as_secs())]
    Changing,
}

impl HasKind for ViewError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotRunning => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}

/// The views of one container: at most one of each kind at a time.
#[derive(Debug, Default)]
pub(crate) struct View {
    with_mounts: Mutex<Option<Serving>>,
    without_mounts: Mutex<Option<Serving>>,
    /// For both.
    gate: WriteGate,
}

/// What a view shows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ViewedRoot<'a> {
    /// The root directory of the container's init, and what is mounted in it.
    OfInit(Pid),
    /// The root file system at this path of the agent's mount namespace, where nothing is mounted in it.
    WithoutMounts(&'a Path),
}

impl ViewedRoot<'_> {
    fn open(self, reaper: &Reaper) -> Result<OwnedFd, ViewError> {
        match self {
            Self::OfInit(init) => root_of(reaper, init),
            Self::WithoutMounts(path) => open(path, ROOT_FLAGS, Mode::empty()).map_err(ViewError::Root),
        }
    }
}

const ROOT_FLAGS: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

#[derive(Debug)]
struct Serving {
    server: Pid,
    reaper: Reaper,
    exit: oneshot::Receiver<WaitStatus>,
    relay: AbortHandle,
}

impl View {
    /// Serves the files below `root` on `stream`. A server of the same kind from an earlier call ends.
    ///
    /// # Errors
    /// The container has ended, or the server cannot be started.
    pub(crate) async fn open(
        &self,
        engine: &Engine,
        reaper: &Reaper,
        root: ViewedRoot<'_>,
        stream: Stream,
    ) -> Result<(), ViewError> {
        let serving = match root {
            ViewedRoot::OfInit(_) => &self.with_mounts,
            ViewedRoot::WithoutMounts(_) => &self.without_mounts,
        };
        let mut serving = serving.lock().await;
        end(serving.take()).await;
        let root = root.open(reaper)?;
        let (ours, servers) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ViewError::Socket)?;
        let process = engine.serve_view(reaper, root, servers).await?;
        let relay = Relay::open(ours, self.gate.clone()).await.map_err(ViewError::Server)?;
        let relay = tokio::spawn(relay.run(stream)).abort_handle();
        let (server, reaper) = (process.pid, reaper.clone());
        *serving = Some(Serving { server, reaper, exit: process.exit, relay });
        Ok(())
    }

    /// Makes the views read-only, and returns when no change is in progress.
    ///
    /// # Errors
    /// A change takes too long; the views are writable again.
    pub(crate) async fn make_read_only(&self) -> Result<(), ViewError> {
        timeout(CHANGE_DEADLINE, self.gate.close()).await.map_err(|_| {
            self.gate.open();
            ViewError::Changing
        })
    }

    pub(crate) fn make_writable(&self) {
        self.gate.open();
    }

    /// Ends the servers, and returns when they are gone.
    pub(crate) async fn end(&self) {
        for serving in [&self.with_mounts, &self.without_mounts] {
            end(serving.lock().await.take()).await;
        }
    }
}

async fn end(serving: Option<Serving>) {
    let Some(Serving { server, reaper, exit, relay }) = serving else { return };
    relay.abort();
    if let Err(errno) = reaper.signal(server, Signal::SIGKILL as i32) {
        console::say(&format!("cannot end the server of a container's files: {errno}"));
    }
    // An error means that the server was reaped before.
    let _ = exit.await;
}

fn root_of(reaper: &Reaper, init: Pid) -> Result<OwnedFd, ViewError> {
    // The pid is not reused while this handle is open.
    let _handle = reaper.open(init).map_err(ViewError::Root)?.ok_or(ViewError::NotRunning)?;
    match open(format!("/proc/{init}/root").as_str(), ROOT_FLAGS, Mode::empty()) {
        Err(Errno::ENOENT) => Err(ViewError::NotRunning),
        root => root.map_err(ViewError::Root),
    }
}
