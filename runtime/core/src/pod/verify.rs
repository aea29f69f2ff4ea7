//! A trial restore: a checkpoint is restored in a VM of its own, up to the moment before its processes would
//! run, before the checkpoint request succeeds.
//!
//! ```text
//!   trial disk   while the source is frozen: its disk is copied, or its snapshot is kept from changing
//!   verify       checkpoint written -> another VM, with the trial disk -> CRIU restores -> the VM is killed
//! ```
//! The trial changes nothing of the source container: the base disk is attached read-only, and writes go to
//! the trial disk, which has no name. The restored processes get /dev/null or pipes without a peer as their
//! standard streams, and execute no instruction. The trial's VM has the container's volumes, in which CRIU opens the
//! files that the processes have open; a file that was removed exists there for a moment.

use std::{fs::File, future::ready, path::Path, sync::Arc};

use machinen_protocol::api::Stdio;
use machinen_storage::container_disk::{self, ContainerDiskPlan};
use machinen_vm::Vm;
use protobuf::MessageField;
use tokio::{sync::MutexGuard, task::spawn_blocking};

use super::{
    Container, CreateRequest, Pod, PodError,
    copies::{self, OpenCopy},
    create::{self, Attachments, CheckpointOrigin, ContainerDisks, CreatePlan, OpenDisks},
    layer,
    leftovers::VM_DIR,
    phases::PhaseTimes,
    restore::restore_disk,
    sandbox::{Lifetime, Sandbox, SandboxSettings},
    stdio::ProcessStdio,
};
use crate::{
    config::{self, VerifyMode},
    network::PodNetwork,
    shares::{PodShares, ShareGuest},
    spec::volumes,
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
        let copy = move || container_disk::unnamed_copy(&disk, &dir);
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
        let (sandbox, shares) = (self.trial_sandbox(), PodShares::default());
        let restored = self.restore_without_start(&sandbox, &shares, container, dir, trial_disk);
        self.shared.cgroup.set_vms(2).await;
        let restored = phases.time("verify", restored).await;
        sandbox.end().await;
        shares.settle().await;
        self.shared.cgroup.set_vms(1).await;
        restored.map_err(|source| PodError::Verify { id: container.id.to_string(), source: Box::new(source) })
    }

    /// A VM of its own, which ends after the trial.
    fn trial_sandbox(&self) -> Sandbox {
        let shared = &self.shared;
        let settings = SandboxSettings {
            config: Arc::clone(&shared.config),
            name: format!("{}-verify", shared.name),
            namespace: shared.namespace.clone(),
            dir: shared.state_dir.join(VM_DIR).join(DIR),
            lifetime: Lifetime::Sandbox,
            containerd: None,
            unclaimed: Arc::clone(&shared.starting),
        };
        Sandbox::new(settings, None)
    }

    async fn restore_without_start(
        &self,
        sandbox: &Sandbox,
        shares: &PodShares,
        container: &Container,
        dir: &Path,
        trial_disk: TrialDisk<'_>,
    ) -> Result<(), PodError> {
        let id = container.id.as_str();
        let plan = self.prepare_trial(container, dir).await?;
        let phases = PhaseTimes::default();
        let request = plan.vm_request();
        let disks = async {
            let (base, own, checkpoint, copies) = tokio::try_join!(
                create::base_disk(&plan, id),
                layer::trial_disk(&plan.rootfs, &plan.config, trial_disk.copy),
                restore_disk(plan.restore.as_ref(), &phases),
                copies::open(&plan, id),
            )?;
            let root = create::root_disks(&plan, base, own);
            let open = ContainerDisks { root, checkpoint, host: Vec::new(), copies: Vec::new() };
            Ok((open, copies))
        };
        let (mut acquired, disks) =
            create::with_vm(sandbox.acquire(id, &request, ready(None)), disks).await?;
        let network = container.network.as_deref();
        match self.create_without_start(&plan, id, shares, &acquired.vm, &disks, network).await {
            Err(error) if acquired.origin.is_clone() && error.is_loss_of_the_vm() => {
                sandbox.boot_instead(id, &request, &mut acquired, &error).await?;
                self.create_without_start(&plan, id, shares, &acquired.vm, &disks, network).await
            }
            created => created,
        }
    }

    async fn prepare_trial(&self, container: &Container, dir: &Path) -> Result<CreatePlan, PodError> {
        let create = CreateRequest {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            stdio: ProcessStdio::default(),
            checkpoint: Some(dir.to_owned()),
        };
        let mut plan = self.plan(&create, CheckpointOrigin::Pod).await?;
        // The trial reads all of the memory.
        plan.config.restore.lazy = false;
        if let ContainerDiskPlan::Whole { root } | ContainerDiskPlan::InPlace { root } = plan.rootfs.disk {
            // The directory holds all of the changes. The label of the container's own disk must not decide
            // about the base disk. The trial's disk has no name.
            plan.rootfs.disk = ContainerDiskPlan::Unexported { path: root };
        }
        Ok(plan)
    }

    async fn create_without_start(
        &self,
        plan: &CreatePlan,
        id: &str,
        shares: &PodShares,
        vm: &Vm,
        (disks, copies): &(OpenDisks, Vec<OpenCopy>),
        network: Option<&PodNetwork>,
    ) -> Result<(), PodError> {
        let injected = plan.read_injected().await?;
        // The disks and the volumes stay until the VM ends.
        let attachments = Attachments::new(vm.clone(), plan.config.rootdisk.reserve(), false);
        let (addresses, agent) = attachments.attach(id, disks, &[], copies, &PhaseTimes::default()).await?;
        if let Some(network) = network {
            // Sockets are bound to these addresses. The trial's network device is connected with nothing.
            network.copy_to(&agent).await.map_err(PodError::Network)?;
        }
        let Some((restore, disk)) = plan.restore.as_ref().zip(disks.checkpoint.as_ref()) else {
            return Ok(());
        };
        let guest = ShareGuest { vm, agent: &agent, unclaimed: &self.shared.starting };
        let shared = shares.add(&guest, &plan.volumes).await?;
        let stdio = Stdio { terminal: restore.has_terminal(), ..Default::default() };
        let vcpus = vm.spec().vcpus;
        let mut spec = plan.guest.for_vm(vcpus);
        volumes::set_sources(&mut spec, &plan.guest.volumes, shared.entries());
        let mut request = create::request(id, &spec, &addresses, plan.rootfs.mapped, stdio, injected)?;
        let config = &plan.config.restore;
        let from = restore.request(addresses.checkpoint, config, shared.volumes(), &spec, vcpus);
        request.checkpoint = MessageField::some(from);
        let created = agent.create_container(request).await;
        created.map(drop).map_err(|source| restore.refused(disk, source))
    }
}
