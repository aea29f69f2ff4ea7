//! What of a checkpoint the guest does: a container's memory and state onto a disk, while it stands still as short as can be.
//!
//! ```text
//!   disk attached -> (pre-dump: memory copied, it runs) -> frozen, layer exported -> dump -> goes on -> disk detached
//! ```

use std::{
    fs::File,
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use machinen_protocol::api::{CheckpointContainerRequest, CheckpointContainerResponse};
use protobuf::MessageField;
use tokio::task::spawn_blocking;

use super::{
    Container, Pod, PodError,
    checkpoint::{Checkpoint, guest_disk},
    phases::Phases,
};
use crate::{
    agent,
    checkpoint::{CheckpointError, Images},
    config,
    error::chain,
    rootdisk::RootdiskCache,
    vm::DiskSpec,
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

/// What CRIU has left, and how long it took.
pub(super) struct Dumped {
    pub(super) images: Images,
    pub(super) criu: Duration,
    /// Which directory has what the container had written; see [`crate::layer::identity`].
    pub(super) layer: Option<String>,
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

    /// Has CRIU dump. A container that ran goes on, unless it is to end: then it is held until it does, or [`Taking::let_go`].
    ///
    /// # Errors
    /// No space, or CRIU cannot.
    pub(super) async fn images(&self, phases: &Phases) -> Result<Dumped, PodError> {
        let id = self.container.id.as_str();
        let vm = self.pod.vm_of(id).await?;
        let (disk, size) = self.scratch_disk().await?;
        let file = disk.try_clone().map_err(PodError::Descriptor)?.into();
        let attached = DiskSpec { file, read_only: false, volatile: true, serial: "checkpoint".to_owned() };
        let vm_error = |what| move |source| PodError::Vm { what, source };
        let address = vm.attach_disk(attached).await.map_err(vm_error("attach a disk for the checkpoint"))?;
        let request = CheckpointContainerRequest {
            container_id: id.to_owned(),
            disk: MessageField::some(guest_disk(address)),
            options: MessageField::some(self.wanted.options.criu()),
            ..Default::default()
        };
        let dumped = self.dump(request, phases).await;
        let detached = vm.detach_disk(address).await;
        // The guest only sees that a write has failed.
        let dumped = dumped.map_err(|error| match is_full(&disk) {
            true => {
                let path = self.pod.shared.config.rootdisk.dir.clone();
                let source = CheckpointError::NoSpace { path, source: io::ErrorKind::StorageFull.into() };
                PodError::Checkpoint { id: id.to_owned(), source }
            }
            false => error,
        })?;
        detached.map_err(vm_error("detach the checkpoint's disk"))?;
        let (dumped, layer) = dumped;
        let criu = Duration::from_micros(dumped.criu_us);
        let images = Images { disk, size, files: dumped.files, facts: dumped.facts.unwrap_or_default() };
        Ok(Dumped { images, criu, layer })
    }

    async fn dump(
        &self,
        request: CheckpointContainerRequest,
        phases: &Phases,
    ) -> Result<(CheckpointContainerResponse, Option<String>), PodError> {
        let id = self.container.id.as_str();
        if self.runs && self.container.pre_dump {
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
            let dumped = phases.time("dump", self.agent.checkpoint_container(request)).await;
            Ok((dumped.map_err(|source| PodError::guest("checkpoint", id, source))?, layer))
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
        let before = if self.container.pre_dump { memory } else { 0 };
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
