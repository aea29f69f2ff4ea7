//! The guest's part of a checkpoint: dumps a container's memory and state onto a disk, and keeps the
//! container frozen as briefly as possible.
//!
//! ```text
//!   disk attached -> (pre-dump: memory copied while it runs) -> frozen, layer exported -> dump -> resumed
//!                     (written back, located) x n, while the host copies and digests
//! ```

use std::{
    fs::File,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use machinen_base::{error::chain, space::DiskReserve};
use machinen_protocol::api::{
    CheckpointContainerRequest, CheckpointContainerResponse, CheckpointFacts, CheckpointImagesResponse,
};
use machinen_storage::container_disk::{self, ContainerDiskOptions};
use machinen_vm::{DiskAddress, DiskBacking, DiskSpec, Vm, agent};
use protobuf::MessageField;
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Container, Pod, PodError, connections::HeldConnections, copies::OpenCopy, frozen::Frozen,
    phases::PhaseTimes, verify::TrialDisk,
};
use crate::{
    checkpoint::{CheckpointError, DumpImages, DumpOptions},
    config::VerifyMode,
};

/// Upper bound of the size of all images that do not hold memory of the container, bytes.
const OTHER_IMAGES: u64 = 256 << 20;

/// Longest time in which the guest may write all images back and report where they are.
const LOCATE: Duration = Duration::from_secs(15 * 60);

/// A dump that is being made.
pub(super) struct Dump<'a> {
    pod: &'a Pod,
    container: &'a Container,
    agent: &'a agent::Client,
    options: DumpOptions,
    exit: bool,
    runs: bool,
}

/// The result of a dump by CRIU.
pub(super) struct DumpOutcome<'a> {
    /// The disk that the guest has written the images to.
    pub(super) disk: ScratchDisk,
    pub(super) facts: CheckpointFacts,
    /// Identity of the directory that holds what the container had written; see [`machinen_storage::layer::identity`].
    pub(super) layer: Option<String>,
    /// The disk for a trial restore, if there is to be one.
    pub(super) trial_disk: Option<TrialDisk<'a>>,
    /// The container, if this dump has frozen it and the request ends it.
    pub(super) frozen: Option<Frozen>,
    /// The connections of a container that stays frozen.
    pub(super) connections: HeldConnections,
}

/// What the guest has returned of a container that is frozen.
struct FrozenDump<'a> {
    response: CheckpointContainerResponse,
    layer: Option<String>,
    trial_disk: Option<TrialDisk<'a>>,
    connections: HeldConnections,
}

/// A disk that is attached to the VM for the images, and detached afterwards.
pub(super) struct ScratchDisk {
    vm: Vm,
    address: DiskAddress,
    file: Arc<File>,
    /// Bytes.
    size: u64,
}

impl ScratchDisk {
    async fn attach(vm: Vm, file: File, size: u64) -> Result<Self, PodError> {
        let source = DiskBacking::File(file.try_clone().map_err(PodError::Descriptor)?.into());
        let serial = "checkpoint".to_owned();
        // Where space is short the guest's writes fail instead of waiting: the container may be frozen meanwhile, and a
        // checkpoint can be repeated.
        let reserve = DiskReserve::default();
        let disk = DiskSpec { source, read_only: false, volatile: true, serial, reserve };
        let attached = vm.attach_disk(disk).await;
        let what = "attach a disk for the checkpoint";
        let address = attached.map_err(|source| PodError::Vm { what, source })?;
        Ok(Self { vm, address, file: Arc::new(file), size })
    }

    /// The images on this disk, as the guest reports their locations through `located`.
    pub(super) fn images(&self, located: mpsc::Receiver<CheckpointImagesResponse>) -> DumpImages {
        DumpImages { disk: Arc::clone(&self.file), size: self.size, located }
    }

    /// Detaches the disk in the background: the guest has finished with it, so no caller has to wait.
    pub(super) fn release(self) {
        tokio::spawn(async move {
            // A disk that stays attached occupies one of the VM's disk slots.
            self.detach().await.unwrap_or_else(|error| tracing::warn!("{}", chain(&error)));
        });
    }

    /// # Errors
    /// QEMU refuses to detach the disk.
    async fn detach(self) -> Result<(), PodError> {
        let what = "detach the checkpoint's disk";
        self.vm.detach_disk(self.address).await.map_err(|source| PodError::Vm { what, source })
    }
}

impl<'a> Dump<'a> {
    /// `exit`: the request ends the container. `runs`: the container is running, and not paused by a client.
    pub(super) fn new(
        pod: &'a Pod,
        container: &'a Container,
        agent: &'a agent::Client,
        options: DumpOptions,
        exit: bool,
        runs: bool,
    ) -> Self {
        Self { pod, container, agent, options, exit, runs }
    }

    /// Has CRIU dump the container onto a disk. A running container resumes afterwards, unless the request
    /// ends it: then the result has the frozen container.
    ///
    /// # Errors
    /// There is no space, or CRIU fails. The disk is detached then.
    pub(super) async fn run(&self, phases: &PhaseTimes) -> Result<DumpOutcome<'a>, PodError> {
        let id = self.container.id.as_str();
        let vm = self.pod.vm_of(id).await?;
        let (disk, size) = self.scratch_disk().await?;
        let attached = phases.time("attach", ScratchDisk::attach(vm, disk, size)).await?;
        let request = CheckpointContainerRequest {
            container_id: id.to_owned(),
            disk: MessageField::some(attached.address.into()),
            options: MessageField::some(self.options.criu()),
            ..Default::default()
        };
        match self.freeze_and_dump(request, phases).await {
            Ok((FrozenDump { response, layer, trial_disk, connections }, frozen)) => {
                let CheckpointContainerResponse { facts, criu_us, .. } = response;
                phases.record("criu", Duration::from_micros(criu_us));
                Ok(DumpOutcome {
                    disk: attached,
                    facts: facts.unwrap_or_default(),
                    layer,
                    trial_disk,
                    frozen,
                    connections,
                })
            }
            Err(error) => {
                let error = self.explain(error, &attached);
                attached.detach().await.unwrap_or_else(|error| tracing::warn!(id, "{}", chain(&error)));
                Err(error)
            }
        }
    }

    /// Has the guest write the dump back to the disk, and forwards the locations that it reports.
    ///
    /// # Errors
    /// There is no space, or the guest fails.
    pub(super) async fn locate(
        &self,
        attached: &ScratchDisk,
        located: mpsc::Sender<CheckpointImagesResponse>,
    ) -> Result<(), PodError> {
        let id = self.container.id.as_str();
        let until = tokio::time::Instant::now() + LOCATE;
        loop {
            let answer = tokio::time::timeout_at(until, self.agent.checkpoint_images(id)).await;
            let late = |_| PodError::Unanswered { verb: "checkpoint", id: id.to_owned(), deadline: LOCATE };
            let answer = answer.map_err(late)?;
            let answer =
                answer.map_err(|source| self.explain(PodError::guest("checkpoint", id, source), attached))?;
            let last = answer.last;
            // If the receiver has failed to write the files, it reports that failure itself.
            if located.send(answer).await.is_err() || last {
                return Ok(());
            }
        }
    }

    /// Replaces the error by "no space" if the host's file system is full: the guest only notices that a
    /// write has failed.
    fn explain(&self, error: PodError, attached: &ScratchDisk) -> PodError {
        let reserve = self.pod.shared.config.rootdisk.reserve();
        if is_full(&attached.file, reserve) { self.no_space() } else { error }
    }

    fn no_space(&self) -> PodError {
        let path = self.pod.shared.config.rootdisk.dir.clone();
        let source = CheckpointError::NoSpace { path, source: io::ErrorKind::StorageFull.into() };
        PodError::Checkpoint { id: self.container.id.to_string(), source }
    }

    /// The container is frozen for as short a time as possible. It stays frozen only if the request ends it.
    async fn freeze_and_dump(
        &self,
        request: CheckpointContainerRequest,
        phases: &PhaseTimes,
    ) -> Result<(FrozenDump<'a>, Option<Frozen>), PodError> {
        let id = self.container.id.as_str();
        if self.runs && self.container.checkpoint_config.pre_dump {
            let copied = phases.time("pre-dump", self.agent.pre_dump_container(request.clone())).await;
            if let Err(error) = copied {
                tracing::warn!(id, "cannot copy memory ahead of a checkpoint: {}", chain(&error));
            }
        }
        let since = Instant::now();
        let frozen = if self.runs { Some(Frozen::freeze(self.agent, id).await?) } else { None };
        let dumped = self.dump_and_hold(request, phases).await;
        let frozen = match frozen {
            Some(frozen) if dumped.is_err() || !self.exit => {
                frozen.thaw().await;
                None
            }
            frozen => frozen,
        };
        phases.record("frozen", since.elapsed());
        Ok((dumped?, frozen))
    }

    /// If the container stays frozen, it keeps its connections only if the dump fails.
    async fn dump_and_hold(
        &self,
        request: CheckpointContainerRequest,
        phases: &PhaseTimes,
    ) -> Result<FrozenDump<'a>, PodError> {
        let connections = match self.exit || !self.runs {
            true => HeldConnections::of(self.pod, self.container, self.options).await?,
            false => HeldConnections::NONE,
        };
        match self.dump_frozen(request, phases).await {
            Ok(dumped) => Ok(FrozenDump { connections, ..dumped }),
            Err(error) => {
                connections.release().await;
                Err(error)
            }
        }
    }

    async fn dump_frozen(
        &self,
        request: CheckpointContainerRequest,
        phases: &PhaseTimes,
    ) -> Result<FrozenDump<'a>, PodError> {
        let id = self.container.id.as_str();
        if self.runs {
            self.pod.while_frozen(self.container).await?;
        }
        let layer = self.container.layer.identity().map_err(PodError::Layer)?;
        // Input that the process has not read yet becomes part of the checkpoint. Input that the caller
        // writes from now on goes to the source container only.
        let held = self.container.init.hold_stdin().await;
        let request = CheckpointContainerRequest {
            stdin_bytes: held.as_deref().copied().unwrap_or(0),
            sync_rootfs: TrialDisk::copies_disk(self.container),
            is_tried: self.container.checkpoint_config.verify != VerifyMode::Off,
            ..request
        };
        let dumped = phases.time("dump", self.agent.checkpoint_container(request)).await;
        drop(held);
        let response = dumped.map_err(|source| PodError::guest("checkpoint", id, source))?;
        let trial_disk = TrialDisk::of(self.container, &self.pod.shared.config);
        let trial_disk = phases.time("trial-disk", trial_disk).await?;
        Ok(FrozenDump { response, layer, trial_disk, connections: HeldConnections::NONE })
    }

    /// Creates a disk with room for the largest possible images. It has no name, and is removed when its
    /// descriptor is closed.
    async fn scratch_disk(&self) -> Result<(File, u64), PodError> {
        let memory = u64::from(self.container.vm.spec().memory_mib) << 20;
        let before = if self.container.checkpoint_config.pre_dump { memory } else { 0 };
        let written = self.container.copies.iter().map(OpenCopy::written).sum::<Result<u64, _>>()?;
        let size = memory * 5 / 4 + before + written * 5 / 4 + OTHER_IMAGES;
        let options = ContainerDiskOptions { size, ..self.pod.shared.config.rootdisk.container_disks() };
        let make = move || container_disk::scratch(&options);
        let file = spawn_blocking(make).await.map_err(PodError::Worker)??;
        Ok((file, size))
    }
}

/// Whether the host's file system with this file is out of space that the guest may take.
fn is_full(file: &File, reserve: DiskReserve) -> bool {
    reserve.space(file).is_ok_and(|space| space.usable() < 1 << 20)
}
