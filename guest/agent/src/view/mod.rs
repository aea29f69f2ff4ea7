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

use std::{io, os::fd::OwnedFd, time::Duration};

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

/// The view of one container: at most one at a time.
#[derive(Debug, Default)]
pub(crate) struct View {
    serving: Mutex<Option<Serving>>,
    gate: WriteGate,
}

#[derive(Debug)]
struct Serving {
    server: Pid,
    reaper: Reaper,
    exit: oneshot::Receiver<WaitStatus>,
    relay: AbortHandle,
}

impl View {
    /// Serves the root directory of the container's `init` on `stream`. A server from an earlier call ends.
    ///
    /// # Errors
    /// The container has ended, or the server cannot be started.
    pub(crate) async fn open(
        &self,
        engine: &Engine,
        reaper: &Reaper,
        init: Pid,
        stream: Stream,
    ) -> Result<(), ViewError> {
        let mut serving = self.serving.lock().await;
        end(serving.take()).await;
        let root = root_of(reaper, init)?;
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

    /// Makes the view read-only, and returns when no change is in progress.
    ///
    /// # Errors
    /// A change takes too long; the view is writable again.
    pub(crate) async fn make_read_only(&self) -> Result<(), ViewError> {
        timeout(CHANGE_DEADLINE, self.gate.close()).await.map_err(|_| {
            self.gate.open();
            ViewError::Changing
        })
    }

    pub(crate) fn make_writable(&self) {
        self.gate.open();
    }

    /// Ends the server, and returns when it is gone.
    pub(crate) async fn end(&self) {
        end(self.serving.lock().await.take()).await;
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
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match open(format!("/proc/{init}/root").as_str(), flags, Mode::empty()) {
        Err(Errno::ENOENT) => Err(ViewError::NotRunning),
        root => root.map_err(ViewError::Root),
    }
}
