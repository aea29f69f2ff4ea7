//! A container's root file system for the host: what `/proc/PID/root` of its anchor shows there.
//!
//! ```text
//!   host ── raw stream ── Passage (a task of the agent) ── socket ── server (a process of its own) ── files
//! ```
//! It is made when the host asks for it, so a container that nobody looks into has none.

mod attributes;
mod filesystem;
mod nodes;
mod passage;
mod server;
mod tree;

use std::{io, os::fd::OwnedFd, time::Duration};

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
    agent::Parts,
    channel::Stream,
    engine::EngineError,
    reaper::{Exit, Reaper},
};
use passage::{Gate, Passage};
pub(crate) use server::serve;

/// How long a change that is being made may take when the container is paused.
const CHANGE_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    #[error("the container does not run")]
    NotRunning,
    #[error("cannot open the container's root")]
    Root(#[source] Errno),
    #[error("cannot make a socket for who serves the container's files")]
    Socket(#[source] Errno),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot talk to who serves the container's files")]
    Server(#[source] io::Error),
    #[error("a change that the host makes to the container's files has not ended within {} s", CHANGE_DEADLINE.as_secs())]
    Changing,
}

/// The view of one container: at most one at a time.
#[derive(Debug, Default)]
pub(crate) struct View {
    serving: Mutex<Option<Serving>>,
    gate: Gate,
}

#[derive(Debug)]
struct Serving {
    server: Pid,
    reaper: Reaper,
    exit: oneshot::Receiver<Exit>,
    passage: AbortHandle,
}

impl View {
    /// Serves what the container's `init` has as its root, on `stream`. An earlier one ends.
    ///
    /// # Errors
    /// The container has ended, or the server cannot be made.
    pub(crate) async fn open(&self, parts: &Parts, init: Pid, stream: Stream) -> Result<(), ViewError> {
        let mut serving = self.serving.lock().await;
        end(serving.take()).await;
        let root = root_of(&parts.reaper, init)?;
        let (ours, servers) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(ViewError::Socket)?;
        let process = parts.engine.serve_view(&parts.reaper, root, servers).await?;
        let passage = Passage::open(ours, self.gate.clone()).await.map_err(ViewError::Server)?;
        let passage = tokio::spawn(passage.run(stream)).abort_handle();
        let (server, reaper) = (process.pid, parts.reaper.clone());
        *serving = Some(Serving { server, reaper, exit: process.exit, passage });
        Ok(())
    }

    /// Nothing can be changed through it when this returns.
    ///
    /// # Errors
    /// Something is still being changed.
    pub(crate) async fn hold(&self) -> Result<(), ViewError> {
        timeout(CHANGE_DEADLINE, self.gate.close()).await.map_err(|_| {
            self.gate.open();
            ViewError::Changing
        })
    }

    pub(crate) fn release(&self) {
        self.gate.open();
    }

    /// Nothing of it is left when this returns.
    pub(crate) async fn end(&self) {
        end(self.serving.lock().await.take()).await;
    }
}

async fn end(serving: Option<Serving>) {
    let Some(Serving { server, reaper, exit, passage }) = serving else { return };
    passage.abort();
    if let Err(errno) = reaper.signal(server, Signal::SIGKILL as i32) {
        crate::console::say(&format!("cannot end who serves a container's files: {errno}"));
    }
    // An error means that it was reaped before.
    let _ = exit.await;
}

fn root_of(reaper: &Reaper, init: Pid) -> Result<OwnedFd, ViewError> {
    // Its pid is its own while it is held.
    let _held = reaper.hold(init).map_err(ViewError::Root)?.ok_or(ViewError::NotRunning)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    match open(format!("/proc/{init}/root").as_str(), flags, Mode::empty()) {
        Err(Errno::ENOENT) => Err(ViewError::NotRunning),
        root => root.map_err(ViewError::Root),
    }
}
