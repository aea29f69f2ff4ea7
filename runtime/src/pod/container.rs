//! One container of a pod, as the host knows it after it was created.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use tokio::sync::RwLock;

use super::{
    Process,
    anchor::Anchor,
    checkpoint,
    exec::Execs,
    layer::Layer,
    rootfs::RootfsMount,
    state::{Exit, State},
    stdio::StdioNames,
};
use crate::{config, process, rootdisk::RootdiskKey, vm::Vm};

/// A container that exists in the guest.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub bundle: PathBuf,
    /// Pid of the anchor, the host process that stands for the container.
    pub pid: u32,
    anchor: tokio::sync::Mutex<Anchor>,
    /// The pod's, for when its agent is of no use any more.
    pub(super) vm: Vm,
    pub(super) init: Arc<Process>,
    pub(super) execs: Execs,
    /// Read while a process is being added, written while the container is being frozen: a process that arrives in a
    /// frozen cgroup could not report that it was started, and a checkpoint would be refused because of it.
    pub(super) freezing: RwLock<()>,
    pub(super) layer: Layer,
    /// The disk with the lower layers of its root file system, where that is an overlay.
    pub(super) base: Option<RootdiskKey>,
    /// The checkpoint that it goes on from, until it has been started.
    pub(super) checkpoint: Mutex<Option<checkpoint::Source>>,
    /// How its checkpoints are taken.
    pub(super) taking: config::Checkpoint,
    /// How the caller mounted its root file system.
    pub(super) rootfs: Vec<RootfsMount>,
}

/// What a container has of disks, and how they are used.
#[derive(Debug)]
pub(super) struct Storage {
    pub(super) layer: Layer,
    pub(super) base: Option<RootdiskKey>,
    pub(super) checkpoint: Option<checkpoint::Source>,
    pub(super) taking: config::Checkpoint,
    pub(super) rootfs: Vec<RootfsMount>,
}

impl Container {
    pub(super) fn new(
        id: String,
        bundle: PathBuf,
        stdio: StdioNames,
        anchor: Anchor,
        vm: Vm,
        storage: Storage,
    ) -> Self {
        let Storage { layer, base, checkpoint, taking, rootfs } = storage;
        Self {
            id,
            bundle,
            pid: anchor.pid(),
            anchor: tokio::sync::Mutex::new(anchor),
            vm,
            init: Arc::new(Process::new(stdio)),
            execs: Execs::default(),
            freezing: RwLock::default(),
            layer,
            base,
            checkpoint: Mutex::new(checkpoint),
            taking,
            rootfs,
        }
    }

    /// That of its init.
    pub fn state(&self) -> State {
        self.init.state()
    }

    /// Resolves when the container's init has ended and its output was delivered.
    pub async fn exited(&self) -> Exit {
        self.init.exited().await
    }

    /// Resolves when nothing of the container is left in the guest.
    pub(super) async fn gone_from_guest(&self) {
        self.init.gone().await;
    }

    /// Resolves when the anchor has ended, by whomever.
    pub(super) async fn anchor_ended(&self) -> process::ProcessExit {
        let ended = self.anchor.lock().await.ended();
        ended.await
    }

    /// Ends the anchor, and with it the view of the container's files, as the container has ended.
    pub(super) async fn end_anchor(&self) {
        if let Err(error) = self.anchor.lock().await.end().await {
            tracing::warn!(id = self.id, "cannot end the container's anchor: {error}");
        }
    }
}
