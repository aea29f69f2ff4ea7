//! Creates a container: from a bundle to an init that waits in the guest.
//!
//! ```text
//!   Planned ── launch ──> Launched ── attach ──> Attached ── create ──> Created
//!   (nothing      │         (VM, disks,  │         (disks in      │       (init waits)
//!    changed)     v          anchor)     v          the VM)       v
//!               undo                    undo                     undo
//! ```
//! Each phase is a value, and its step consumes it: the step ends in the next phase, or in an error after
//! everything that was held is given back (`undo.rs`). Only the base disk stays, since it is in a cache. What
//! does not depend on each other runs concurrently, and the guest boots meanwhile.
//! If the container's hooks had begun, its poststop hooks run after the phases; then the id and the pod's cgroup on the
//! host are given back.

mod attach;
mod disks;
mod finish;
mod launch;
mod plan;
mod undo;

use std::{collections::hash_map, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use super::{
    Container, ContainerId, ContainerSlot, Pod, PodError, PodEvent, event::CreatedContainer,
    phases::PhaseTimes, rootfs::RootfsMount, stdio::ProcessStdio,
};
use crate::traces;
use finish::{ContainerWatch, Created};
use launch::Planned;

pub(super) use self::{
    disks::{Attachments, ContainerDisks, OpenDisks, base_disk, request, root_disks},
    launch::with_vm,
    plan::{CheckpointOrigin, CreatePlan},
};

/// A request to create a container.
#[derive(Debug)]
pub struct CreateRequest {
    /// Unique in the pod.
    pub id: ContainerId,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// The mounts of the root file system that the caller asks for; if empty, `root.path` of the
    /// configuration is used.
    pub rootfs: Vec<RootfsMount>,
    /// Where the init's standard streams lead.
    pub stdio: ProcessStdio,
    /// Directory of the checkpoint to restore the container from, instead of executing its command. It may be
    /// removed once the container has been created.
    pub checkpoint: Option<PathBuf>,
}

impl Pod {
    /// Creates a container; its init waits in the guest when this returns. Returns the pid of its anchor.
    ///
    /// # Errors
    /// The bundle, the root file system or this host does not allow it. Nothing is left behind.
    pub async fn create(&self, create: CreateRequest) -> Result<u32, PodError> {
        let reserved = ReservedId::reserve(self, &create.id)?;
        // Runs in a task of its own, so that a caller that goes away does not leave a half-made container.
        let pod = self.clone();
        let task = tokio::spawn(traces::inherit(async move { pod.create_reserved(reserved, create).await }));
        task.await.map_err(PodError::Worker)?
    }

    async fn create_reserved(&self, reserved: ReservedId, create: CreateRequest) -> Result<u32, PodError> {
        let trace = self.trace(if create.checkpoint.is_some() { "restore" } else { "create" }, &create.id);
        let phases = PhaseTimes::default();
        let checkpoint = create.checkpoint.clone();
        let id = create.id.clone();
        let created = phases.time("create", self.create_in_phases(create, &phases)).await;
        trace.end(&created, || phases.spans());
        let Created { container, origin, watch } = match created {
            Ok(created) => created,
            Err(error) => {
                self.run_poststop_hooks(&id).await;
                drop(reserved);
                self.release_cgroup(&id).await;
                return Err(error);
            }
        };
        let (id, pid) = (container.id.as_str(), container.pid);
        reserved.fill(Arc::clone(&container));
        self.emit(created_event(&container, checkpoint));
        tracing::info!(id, pid, %origin, phases = %phases, "container created");
        let ContainerWatch { agent, vm, outputs } = watch;
        tokio::spawn(self.clone().watch(container, agent, vm, outputs));
        Ok(pid)
    }

    async fn create_in_phases(
        &self,
        create: CreateRequest,
        phases: &PhaseTimes,
    ) -> Result<Created, PodError> {
        let planned = Planned::new(self, create, phases).await?;
        planned.launch().await?.attach().await?.create().await
    }
}

fn created_event(container: &Container, checkpoint: Option<PathBuf>) -> PodEvent {
    PodEvent::Created(Box::new(CreatedContainer {
        id: container.id.clone(),
        pid: container.pid,
        bundle: container.bundle.clone(),
        rootfs: container.rootfs.clone(),
        stdio: container.init.stdio.clone(),
        checkpoint,
    }))
}

/// The id of a container that is being created. It is free again when this is dropped.
#[derive(Debug)]
struct ReservedId {
    pod: Pod,
    /// None: a container has it.
    id: Option<ContainerId>,
    /// Dropped after the id has its container, or is free again.
    _creating: watch::Sender<()>,
}

impl ReservedId {
    /// # Errors
    /// A container has the id.
    fn reserve(pod: &Pod, id: &ContainerId) -> Result<Self, PodError> {
        let (creating, waiters) = watch::channel(());
        match pod.containers().entry(id.clone()) {
            hash_map::Entry::Occupied(_) => return Err(PodError::Exists { id: id.to_string() }),
            hash_map::Entry::Vacant(vacant) => vacant.insert(ContainerSlot::Creating(waiters)),
        };
        Ok(Self { pod: pod.clone(), id: Some(id.clone()), _creating: creating })
    }

    /// Gives the id to the container that was created.
    fn fill(mut self, container: Arc<Container>) {
        if let Some(id) = self.id.take() {
            self.pod.containers().insert(id, ContainerSlot::Ready(container));
        }
    }
}

impl Drop for ReservedId {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.pod.containers().remove(id);
        }
    }
}
