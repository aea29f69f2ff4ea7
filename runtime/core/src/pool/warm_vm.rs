//! A clone for a pod that does not exist yet.

use std::path::Path;

use machinen_storage::container_disk::ContainerDiskError;
use machinen_vm::{
    Vm, VmError, VmSnapshotError, VmSpec,
    admission::{self, AdmissionError, HostMemory, Reservation},
    agent::AgentError,
    template::{FoundTemplate, TemplateError, TemplateShape, TemplateStore},
};
use tokio::task::spawn_blocking;

use super::warm_up::warm_up;
use crate::{config::Config, reservations_dir};

/// Why no clone could be made and warmed up.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The host has too little memory for one more VM.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// The VM cannot be cloned.
    #[error("cannot clone a VM")]
    Clone(#[source] VmSnapshotError),
    /// The clone's agent does not answer.
    #[error("the guest agent of the clone cannot be reached")]
    Agent(#[source] VmError),
    /// The disks for the trial container cannot be made.
    #[error("cannot make the disks of the first container")]
    Disks(#[from] ContainerDiskError),
    /// A disk cannot be attached.
    #[error("cannot attach a disk of the first container")]
    Attach(#[source] VmError),
    /// A disk cannot be detached.
    #[error("cannot detach a disk of the first container")]
    Detach(#[source] VmError),
    /// The agent refused a request about the trial container.
    #[error("cannot {verb} the first container")]
    Container {
        /// What was requested, as a verb.
        verb: &'static str,
        /// The cause.
        source: AgentError,
    },
    /// A thread ended without a result.
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

/// Reserves memory for a clone that waits, of what the host does not need otherwise.
fn reserve(config: &Config) -> Result<Reservation, AdmissionError> {
    let reserve = config.vm.memory_reserve_percent.max(config.pool.memory_reserve_percent);
    admission::admit(&reservations_dir(), admission::CLONE_NEEDS_MIB, reserve, HostMemory::now()?)
}

/// Checks whether the host has memory to spare for a clone that waits (`pool.memory_reserve_percent`). Nothing is
/// reserved.
///
/// # Errors
/// It has not, or its memory cannot be read.
pub fn has_room(config: &Config) -> Result<(), AdmissionError> {
    reserve(config).map(drop)
}

/// A VM that was made ahead of time, and the shape of its template.
#[derive(Debug)]
pub struct WarmVm {
    pub(crate) vm: Vm,
    pub(crate) shape: TemplateShape,
}

impl WarmVm {
    /// Clones a VM like `spec` in the directory `dir`; this process owns it. Returns None if there is no
    /// template.
    ///
    /// # Errors
    /// The host has no memory for one more VM, or QEMU refuses the template's state. Nothing is left then.
    pub(super) async fn clone_vm(
        mut spec: VmSpec,
        config: &Config,
        dir: &Path,
    ) -> Result<Option<Self>, CloneError> {
        spec.keep_console = false;
        "ready".clone_into(&mut spec.id);
        "ready".clone_into(&mut spec.hostname);
        let (templates, wanted) = (TemplateStore::at(&config.template.dir), spec.clone());
        let found = spawn_blocking(move || {
            let Some(shape) = TemplateShape::of(&wanted)? else { return Ok::<_, TemplateError>(None) };
            Ok(match templates.find(&shape)? {
                FoundTemplate::Ready(template) => Some((*template, shape)),
                FoundTemplate::Building | FoundTemplate::Absent | FoundTemplate::Failed(_) => None,
            })
        });
        let found = found.await.map_err(CloneError::Worker)??;
        let Some((template, shape)) = found else { return Ok(None) };
        let _promise = reserve(config)?;
        let vm = Vm::restore(spec, dir, &template.snapshot, None).await.map_err(CloneError::Clone)?;
        Ok(Some(Self { vm, shape }))
    }

    /// Waits for the agent and lets it create a container once. A twin of its template's QEMU has nothing to gain
    /// from that, and the start that has requested it still needs the processors. If this fails or is cancelled,
    /// the caller must kill the VM.
    ///
    /// # Errors
    /// The clone does not work.
    pub(super) async fn warm_up(&self, config: &Config) -> Result<(), CloneError> {
        if self.vm.is_twin() {
            return self.vm.agent().await.map(drop).map_err(CloneError::Agent);
        }
        warm_up(&self.vm, config).await
    }
}
