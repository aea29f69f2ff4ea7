//! The host's record of a container after it was created.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use machinen_base::process;
use machinen_storage::rootdisk::RootdiskKey;
use machinen_vm::Vm;
use tokio::sync::RwLock;

use super::{
    ContainerId, ContainerProcess, PodError,
    anchor::Anchor,
    copies::OpenCopy,
    create::Attachments,
    exec::Execs,
    kill_clock::KillClock,
    layer::WritableLayer,
    namespaces::ContainerNamespaces,
    restore::RestoreDisk,
    rootfs::RootfsMount,
    state::{PodRequest, ProcessExit, ProcessState},
    stdio::StdioNames,
};
use crate::{config, hooks::ContainerHooks, network::PodNetwork, shares::ContainerShares};

/// A container that exists in the guest.
#[derive(Debug)]
pub struct Container {
    /// The container's id, unique in its pod.
    pub id: ContainerId,
    /// The directory with `config.json`.
    pub bundle: PathBuf,
    /// Pid of the anchor, the host process that stands for the container.
    pub pid: u32,
    anchor: tokio::sync::Mutex<Anchor>,
    /// The pod's VM, which is killed if its agent does not respond.
    pub(super) vm: Vm,
    /// The connection with the container's network namespace, if it has one.
    pub(super) network: Option<Arc<PodNetwork>>,
    /// By which other containers of the pod recognise the namespaces that they share with this one.
    pub(super) namespaces: ContainerNamespaces,
    pub(super) init: Arc<ContainerProcess>,
    pub(super) execs: Execs,
    /// Runs since the container was sent SIGKILL.
    pub(super) kill_clock: KillClock,
    /// Locked for reading while a process is being added, and for writing while the container is being
    /// frozen: a process that arrives in a frozen cgroup could not report that it was started, and would
    /// prevent a checkpoint.
    pub(super) freezing: RwLock<()>,
    pub(super) layer: WritableLayer,
    /// The disks in the VM.
    pub(super) attachments: Attachments,
    /// The volumes in the guest.
    pub(super) shares: ContainerShares,
    /// The disk with the lower layers of the root file system, if that is an overlay.
    pub(super) base: Option<RootdiskKey>,
    /// The disk of the checkpoint that the container is restored from, until the container has been started.
    pub(super) checkpoint: Mutex<Option<RestoreDisk>>,
    /// How checkpoints of this container are taken.
    pub(super) checkpoint_config: config::CheckpointConfig,
    /// The mounts of the root file system that the caller asked for.
    pub(super) rootfs: Vec<RootfsMount>,
    /// The copies of the host's directories.
    pub(super) copies: Vec<OpenCopy>,
    /// A block device of the host that the container uses.
    pub(super) host_disk: Option<PathBuf>,
    pub(super) hooks: ContainerHooks,
    /// Held while the container is deleted.
    pub(super) deleting: tokio::sync::Mutex<()>,
}

/// The disks of a container, and how they are used.
#[derive(Debug)]
pub(super) struct ContainerStorage {
    pub(super) layer: WritableLayer,
    pub(super) attachments: Attachments,
    pub(super) shares: ContainerShares,
    pub(super) base: Option<RootdiskKey>,
    pub(super) checkpoint: Option<RestoreDisk>,
    pub(super) checkpoint_config: config::CheckpointConfig,
    pub(super) rootfs: Vec<RootfsMount>,
    pub(super) copies: Vec<OpenCopy>,
    pub(super) host_disk: Option<PathBuf>,
}

/// The VM that a container is in.
#[derive(Debug)]
pub(super) struct ContainerGuest {
    pub(super) vm: Vm,
    /// The connection of the VM with the container's network namespace, if it has one.
    pub(super) network: Option<Arc<PodNetwork>>,
    pub(super) namespaces: ContainerNamespaces,
}

impl Container {
    pub(super) fn new(
        id: ContainerId,
        bundle: PathBuf,
        stdio: StdioNames,
        anchor: Anchor,
        guest: ContainerGuest,
        storage: ContainerStorage,
        hooks: ContainerHooks,
    ) -> Self {
        let ContainerGuest { vm, network, namespaces } = guest;
        let ContainerStorage {
            layer,
            attachments,
            shares,
            base,
            checkpoint,
            checkpoint_config,
            rootfs,
            copies,
            host_disk,
        } = storage;
        Self {
            id,
            bundle,
            pid: anchor.pid(),
            anchor: tokio::sync::Mutex::new(anchor),
            vm,
            network,
            namespaces,
            init: Arc::new(ContainerProcess::new(stdio)),
            execs: Execs::default(),
            kill_clock: KillClock::default(),
            freezing: RwLock::default(),
            layer,
            attachments,
            shares,
            base,
            checkpoint: Mutex::new(checkpoint),
            checkpoint_config,
            rootfs,
            copies,
            host_disk,
            hooks,
            deleting: tokio::sync::Mutex::default(),
        }
    }

    /// The state of the container's init.
    pub fn state(&self) -> ProcessState {
        self.init.state()
    }

    /// Whether the state of the container's init allows a request.
    ///
    /// # Errors
    /// Why the request is refused.
    pub(super) fn check(&self, request: PodRequest) -> Result<(), PodError> {
        self.state().allows(request).map_err(|source| PodError::state(request, &self.id, source))
    }

    /// Resolves when the container's init has ended and its output has been delivered.
    pub async fn exited(&self) -> ProcessExit {
        self.init.exited().await
    }

    /// Resolves as soon as the container is not paused, because it was resumed or has ended.
    pub async fn not_paused(&self) {
        self.init.not_paused().await;
    }

    /// Resolves when nothing of the container is left in the guest.
    pub(super) async fn gone_from_guest(&self) {
        self.init.gone().await;
    }

    /// Resolves when the anchor has ended, whatever the cause.
    pub(super) async fn anchor_ended(&self) -> process::ProcessExit {
        let ended = self.anchor.lock().await.ended();
        ended.await
    }

    /// Ends the anchor, and with it the view of the container's files, because the container has ended.
    pub(super) async fn end_anchor(&self) {
        if let Err(error) = self.anchor.lock().await.end().await {
            tracing::warn!(id = self.id.as_str(), "cannot end the container's anchor: {error}");
        }
    }
}
