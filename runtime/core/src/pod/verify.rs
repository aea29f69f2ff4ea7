//! A trial restore: a checkpoint is restored in a VM of its own, up to the moment before its processes would
//! run, before the checkpoint request succeeds.
//!
//! ```text
//!   trial disk   while the source is frozen: its disk is copied, or its snapshot is kept from changing
//!   verify       checkpoint written -> another VM, with the trial disk -> CRIU restores -> the VM is killed
//! ```
//! The trial changes nothing of the source container: the base disk is attached read-only, and writes go to
//! the trial disk, which has no name. The restored processes get /dev/null or pipes without a peer as their
//! standard streams, and execute no instruction.

use std::{fs::File, path::Path};

use machinen_protocol::api::Stdio;
use machinen_storage::{layer::LayerTarget, rootdisk::RootdiskCache};
use protobuf::MessageField;
use tokio::{
    sync::{MutexGuard, mpsc},
    task::spawn_blocking,
};

use super::{
    Container, CreateRequest, Pod, PodError,
    checkpoint::restore_disk,
    create::{self, ContainerDisks, CreatePlan},
    layer,
    phases::PhaseTimes,
};
use crate::{
    checkpoint::ImageDisk,
    config::{self, VerifyMode},
};

/// Directory of the trial's VM, below that of the pod.
const DIR: &str = "verify";

/// The content of a container's disk at the time of its checkpoint.
pub(super) struct TrialDisk<'a> {
    /// A copy of the disk, if the container's changes exist nowhere else.
    copy: Option<File>,
    /// Otherwise a lock that keeps the snapshot from changing.
    _held: Option<MutexGuard<'a, ()>>,
}

impl<'a> TrialDisk<'a> {
    /// Whether the container's disk will be copied. The guest must have written all data to it then.
    pub(super) fn copies_disk(container: &Container) -> bool {
        container.checkpoint_config.verify != VerifyMode::Off && container.layer.only_disk().is_some()
    }

    /// Returns None if the container's checkpoints are not verified. The container must be frozen, and its
    /// changes must have been exported to its snapshot, if it has one.
    ///
    /// # Errors
    /// The disk cannot be copied.
    pub(super) async fn of(
        container: &'a Container,
        config: &config::Config,
    ) -> Result<Option<Self>, PodError> {
        if container.checkpoint_config.verify == VerifyMode::Off {
            return Ok(None);
        }
        let Some(disk) = container.layer.only_disk().map(Path::to_owned) else {
            let held = container.layer.hold().await;
            return Ok(Some(Self { copy: None, _held: Some(held) }));
        };
        let dir = config.rootdisk.dir.clone();
        let copy = move || RootdiskCache::open(&dir)?.unnamed_copy(&disk);
        let copy = spawn_blocking(copy).await.map_err(PodError::Worker)??;
        Ok(Some(Self { copy: Some(copy), _held: None }))
    }
}

impl Pod {
    /// Restores the container's checkpoint from `dir`, and discards the result.
    ///
    /// # Errors
    /// The checkpoint cannot be restored, or there is no VM for the trial.
    pub(super) async fn verify(
        &self,
        container: &Container,
        dir: &Path,
        trial_disk: TrialDisk<'_>,
        phases: &PhaseTimes,
    ) -> Result<(), PodError> {
        let shared = &self.shared;
        // Events of the trial's VM are dropped.
        let (events, _) = mpsc::unbounded_channel();
        let (namespace, name) = (shared.namespace.clone(), format!("{}-verify", shared.name));
        let pod = Self::new(shared.config.clone(), namespace, name, shared.dir.join(DIR), events);
        shared.cgroup.set_vms(2).await;
        let restored = phases.time("verify", pod.restore_without_start(container, dir, trial_disk)).await;
        pod.end().await;
        shared.cgroup.set_vms(1).await;
        restored.map_err(|source| PodError::Verify { id: container.id.clone(), source: Box::new(source) })
    }

    async fn restore_without_start(
        &self,
        container: &Container,
        dir: &Path,
        trial_disk: TrialDisk<'_>,
    ) -> Result<(), PodError> {
        let id = container.id.as_str();
        let plan = self.prepare_trial(container, dir)?;
        let phases = PhaseTimes::default();
        let provisioned = self.provision(&plan);
        let disks = async {
            let disks = tokio::try_join!(
                create::base_disk(&plan, id),
                layer::trial_disk(&plan.rootfs, &plan.config, trial_disk.copy),
                restore_disk(plan.restore.as_ref(), &phases),
            );
            disks.map(|(base, writable, checkpoint)| ContainerDisks {
                base: base.map(|base| base.file),
                writable: Some(writable),
                checkpoint,
            })
        };
        let (provisioned, mut files) = tokio::try_join!(provisioned, disks)?;
        if plan.rootfs.read_only {
            files.base = files.writable.take();
        }
        match self.create_without_start(&plan, id, &provisioned.vm, &files).await {
            Err(error) if provisioned.origin.is_clone() && error.is_loss_of_the_vm() => {
                let provisioned = self.boot_instead(&plan, provisioned, &error).await?;
                self.create_without_start(&plan, id, &provisioned.vm, &files).await
            }
            created => created,
        }
    }

    fn prepare_trial(&self, container: &Container, dir: &Path) -> Result<CreatePlan, PodError> {
        let create = CreateRequest {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            checkpoint: Some(dir.to_owned()),
            ..CreateRequest::default()
        };
        let mut plan = self.plan(&create)?;
        // The trial reads all of the memory.
        plan.config.restore.lazy = false;
        if let Some(LayerTarget::Whole(_)) = plan.rootfs.target {
            // The directory holds all of the changes. The label of the container's own disk must not decide
            // about the base disk.
            plan.rootfs.target = None;
        }
        Ok(plan)
    }

    async fn create_without_start(
        &self,
        plan: &CreatePlan,
        id: &str,
        vm: &machinen_vm::Vm,
        files: &ContainerDisks<File, ImageDisk>,
    ) -> Result<(), PodError> {
        let injected = create::read_injected(&plan.guest.injected)?;
        let (disks, agent) = create::attach_disks(vm, id, files, &PhaseTimes::default()).await?;
        let Some((restore, disk)) = plan.restore.as_ref().zip(files.checkpoint.as_ref()) else {
            return Ok(());
        };
        let stdio = Stdio { terminal: restore.has_terminal(), ..Default::default() };
        let vcpus = self.vm_vcpus();
        let spec = plan.guest.for_vm(vcpus);
        let mut request = create::request(id, &spec, &disks, stdio, injected)?;
        let from = restore.request(disks.checkpoint, plan.config.restore, &spec, vcpus);
        request.checkpoint = MessageField::some(from);
        let created = agent.create_container(request).await;
        created.map(drop).map_err(|source| restore.refused(disk, source))
    }
}
