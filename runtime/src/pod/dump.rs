//! What of a checkpoint the guest does: a container's memory and state onto a disk, while it stands still as short as can be.
//!
//! ```text
//!   disk attached -> (pre-dump: memory copied, it runs) -> frozen, layer exported -> dump -> goes on
//!                                                     (written back, located) x n, while the host copies and digests
//! ```

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use machinen_protocol::api::{
    CheckpointContainerRequest, CheckpointContainerResponse, CheckpointFacts, CheckpointImagesResponse,
};
use protobuf::MessageField;
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Container, Pod, PodError,
    checkpoint::{Checkpoint, guest_disk},
    phases::Phases,
    verify::Twin,
};
use crate::{
    agent,
    checkpoint::{CheckpointError, Images},
    config,
    error::chain,
    rootdisk::RootdiskCache,
    vm::{DiskAddress, DiskBacking, DiskSpec, Vm},
};

/// What images can take beside the container's memory, bytes.
const BESIDE_MEMORY: u64 = 256 << 20;

/// A checkpoint that is being taken.
pub(super) struct Taking<'a> {
    pod: &'a Pod,
    container: &'a Container,
    agent: &'a agent::Client,
    wanted: &'a Checkpoint,
    runs: bool,
    held: AtomicBool,
}

/// What CRIU has left.
pub(super) struct Dumped<'a> {
    /// Where the guest has written it.
    pub(super) attached: Attached,
    pub(super) facts: CheckpointFacts,
    /// Which directory has what the container had written; see [`crate::layer::identity`].
    pub(super) layer: Option<String>,
    /// For a trial restore, if there is to be one.
    pub(super) twin: Option<Twin<'a>>,
}

/// A disk in the VM, to be detached.
pub(super) struct Attached {
    vm: Vm,
    address: DiskAddress,
    file: Arc<File>,
    /// Bytes.
    size: u64,
}

impl Attached {
    async fn attach(vm: Vm, file: File, size: u64) -> Result<Self, PodError> {
        let source = DiskBacking::File(file.try_clone().map_err(PodError::Descriptor)?.into());
        let disk = DiskSpec { source, read_only: false, volatile: true, serial: "checkpoint".to_owned() };
        let attached = vm.attach_disk(disk).await;
        let what = "attach a disk for the checkpoint";
        let address = attached.map_err(|source| PodError::Vm { what, source })?;
        Ok(Self { vm, address, file: Arc::new(file), size })
    }

    /// What is written to it, as the guest tells of it by and by.
    pub(super) fn images(&self, located: mpsc::Receiver<CheckpointImagesResponse>) -> Images {
        Images { disk: Arc::clone(&self.file), size: self.size, located }
    }

    /// Has it detached, which nobody needs to wait for: the guest is done with it.
    pub(super) fn release(self) {
        tokio::spawn(async move {
            // One that stays in the VM costs it a place.
            self.detach().await.unwrap_or_else(|error| tracing::warn!("{}", chain(&error)));
        });
    }

    /// # Errors
    /// QEMU does not let go of it.
    async fn detach(self) -> Result<(), PodError> {
        let what = "detach the checkpoint's disk";
        self.vm.detach_disk(self.address).await.map_err(|source| PodError::Vm { what, source })
    }
}

impl<'a> Taking<'a> {
    /// Of a container that runs, or is paused and stays so.
    pub(super) fn new(
        pod: &'a Pod,
        container: &'a Container,
        agent: &'a agent::Client,
        wanted: &'a Checkpoint,
        runs: bool,
    ) -> Self {
        Self { pod, container, agent, wanted, runs, held: AtomicBool::new(false) }
    }

    /// Has CRIU dump onto a disk. A container that ran goes on, unless it is to end: then it is held until it does, or
    /// [`Taking::let_go`].
    ///
    /// # Errors
    /// No space, or CRIU cannot; the disk is not in the VM any more.
    pub(super) async fn dumped(&self, phases: &Phases) -> Result<Dumped<'a>, PodError> {
        let id = self.container.id.as_str();
        let vm = self.pod.vm_of(id).await?;
        let (disk, size) = self.scratch_disk().await?;
        let attached = phases.time("attach", Attached::attach(vm, disk, size)).await?;
        let request = CheckpointContainerRequest {
            container_id: id.to_owned(),
            disk: MessageField::some(guest_disk(attached.address)),
            options: MessageField::some(self.wanted.options.criu()),
            ..Default::default()
        };
        match self.dump(request, phases).await {
            Ok((CheckpointContainerResponse { facts, criu_us, .. }, layer, twin)) => {
                phases.record("criu", Duration::from_micros(criu_us));
                Ok(Dumped { attached, facts: facts.unwrap_or_default(), layer, twin })
            }
            Err(error) => {
                let error = self.blame(error, &attached);
                attached.detach().await.unwrap_or_else(|error| tracing::warn!(id, "{}", chain(&error)));
                Err(error)
            }
        }
    }

    /// Has what was dumped written back, and passes on where it is.
    ///
    /// # Errors
    /// No space, or the guest cannot.
    pub(super) async fn locate(
        &self,
        attached: &Attached,
        located: mpsc::Sender<CheckpointImagesResponse>,
    ) -> Result<(), PodError> {
        let id = self.container.id.as_str();
        loop {
            let answer = self.agent.checkpoint_images(id).await;
            let answer =
                answer.map_err(|source| self.blame(PodError::guest("checkpoint", id, source), attached))?;
            let last = answer.last;
            // Who has failed to write says so himself.
            if located.send(answer).await.is_err() || last {
                return Ok(());
            }
        }
    }

    /// The guest only sees that a write has failed.
    fn blame(&self, error: PodError, attached: &Attached) -> PodError {
        if is_full(&attached.file) { self.no_space() } else { error }
    }

    fn no_space(&self) -> PodError {
        let path = self.pod.shared.config.rootdisk.dir.clone();
        let source = CheckpointError::NoSpace { path, source: io::ErrorKind::StorageFull.into() };
        PodError::Checkpoint { id: self.container.id.clone(), source }
    }

    async fn dump(
        &self,
        request: CheckpointContainerRequest,
        phases: &Phases,
    ) -> Result<(CheckpointContainerResponse, Option<String>, Option<Twin<'a>>), PodError> {
        let id = self.container.id.as_str();
        if self.runs && self.container.taking.pre_dump {
            let copied = phases.time("pre-dump", self.agent.pre_dump_container(request.clone())).await;
            if let Err(error) = copied {
                tracing::warn!(id, "cannot copy memory ahead of a checkpoint: {}", chain(&error));
            }
        }
        let since = Instant::now();
        if self.runs {
            let paused = self.agent.pause_container(id).await;
            paused.map_err(|source| PodError::guest("pause", id, source))?;
            self.held.store(true, Ordering::Relaxed);
        }
        let dumped = async {
            if self.runs {
                self.pod.while_frozen(self.container).await?;
            }
            let layer = self.container.layer.identity().map_err(PodError::Layer)?;
            // What it has not read of it goes with the checkpoint; what the caller writes meanwhile, to the source only.
            let held = self.container.init.hold_stdin().await;
            let request = CheckpointContainerRequest {
                stdin_bytes: held.as_deref().copied().unwrap_or(0),
                sync_rootfs: Twin::copies_disk(self.container),
                ..request
            };
            let dumped = phases.time("dump", self.agent.checkpoint_container(request)).await;
            drop(held);
            let dumped = dumped.map_err(|source| PodError::guest("checkpoint", id, source))?;
            let twin = phases.time("twin", Twin::of(self.container, &self.pod.shared.config)).await?;
            Ok((dumped, layer, twin))
        };
        let dumped = dumped.await;
        if dumped.is_err() || !self.wanted.exit {
            self.let_go().await;
        }
        phases.record("frozen", since.elapsed());
        dumped
    }

    /// Lets a container go on that this has frozen.
    pub(super) async fn let_go(&self) {
        let id = self.container.id.as_str();
        if self.held.swap(false, Ordering::Relaxed)
            && let Err(error) = self.agent.resume_container(id).await
        {
            tracing::error!(id, "cannot resume after a checkpoint: {}", chain(&error));
        }
    }

    /// As large as the images can be. Nobody can open it, and it goes with its descriptor.
    async fn scratch_disk(&self) -> Result<(File, u64), PodError> {
        let memory = u64::from(self.pod.vm_memory_mib()) << 20;
        let before = if self.container.taking.pre_dump { memory } else { 0 };
        let size = memory * 5 / 4 + before + BESIDE_MEMORY;
        let config::Rootdisk { dir, mke2fs, .. } = self.pod.shared.config.rootdisk.clone();
        let make = move || RootdiskCache::open(&dir)?.unnamed_writable(size, &mke2fs);
        let file = spawn_blocking(make).await.map_err(PodError::Worker)??;
        Ok((file, size))
    }
}

/// The file system of the host that the file is on has no room.
fn is_full(file: &File) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|space| space.f_bavail * space.f_frsize < 1 << 20)
}
