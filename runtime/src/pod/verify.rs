//! A checkpoint that is tried out before its caller hears that it is good: restored in a VM of its own, up to the moment
//! before its processes would run.
//!
//! ```text
//!   twin     while the source is frozen: its disk is copied, or its layer is held as it is in the snapshot
//!   verify   checkpoint written -> another VM, with the twin of the disk -> CRIU restores -> the VM is killed
//! ```
//! Nothing of the source's is written: its base disk is shared for reading, what it writes to is a twin without a name. The
//! processes have /dev/null or pipes without another end as their standard streams, and no instruction of theirs runs.

use std::{fs::File, path::Path};

use machinen_protocol::api::Stdio;
use protobuf::MessageField;
use tokio::{
    sync::{MutexGuard, mpsc},
    task::spawn_blocking,
};

use super::{
    Container, Create, Pod, PodError,
    checkpoint::restore_disk,
    create::{self, Disks, Prepared},
    layer,
    phases::Phases,
};
use crate::{
    checkpoint::ImageDisk,
    config::{self, Verify},
    layer::LayerTarget,
    rootdisk::RootdiskCache,
};

/// Directory of the VM, in that of the pod's.
const DIR: &str = "verify";

/// What the disk of a container had when its checkpoint was taken.
pub(super) struct Twin<'a> {
    /// A copy of the disk, where nothing else has what is on it.
    copy: Option<File>,
    /// Otherwise the snapshot, which stays as it is until this is dropped.
    _held: Option<MutexGuard<'a, ()>>,
}

impl<'a> Twin<'a> {
    /// Whether the container's disk is going to be copied, for which the guest must have written everything to it.
    pub(super) fn copies_disk(container: &Container) -> bool {
        container.taking.verify != Verify::Off && container.layer.only_disk().is_some()
    }

    /// None where no checkpoint of the container's is tried out. The container is frozen, and what it has written is in its
    /// snapshot if it has one.
    ///
    /// # Errors
    /// The disk cannot be copied.
    pub(super) async fn of(
        container: &'a Container,
        config: &config::Config,
    ) -> Result<Option<Self>, PodError> {
        if container.taking.verify == Verify::Off {
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
    /// Restores the container's checkpoint that is in `dir`, and throws the result away.
    ///
    /// # Errors
    /// Why it cannot be restored, or no VM can be had for it.
    pub(super) async fn verify(
        &self,
        container: &Container,
        dir: &Path,
        twin: Twin<'_>,
        phases: &Phases,
    ) -> Result<(), PodError> {
        let shared = &self.shared;
        // No caller gets the events of the second VM.
        let (events, _) = mpsc::unbounded_channel();
        let (namespace, name) = (shared.namespace.clone(), format!("{}-verify", shared.name));
        let pod = Self::new(shared.config.clone(), namespace, name, shared.dir.join(DIR), events);
        let restored = phases.time("verify", pod.restore_held(container, dir, twin)).await;
        pod.end().await;
        restored.map_err(|source| PodError::Verify { id: container.id.clone(), source: Box::new(source) })
    }

    async fn restore_held(&self, container: &Container, dir: &Path, twin: Twin<'_>) -> Result<(), PodError> {
        let id = container.id.as_str();
        let prepared = self.prepare_twin(container, dir)?;
        let phases = Phases::default();
        let birth = self.vm(&prepared);
        let disks = async {
            let disks = tokio::try_join!(
                create::base_disk(&prepared, id),
                layer::twin_disk(&prepared.rootfs, &prepared.config, twin.copy),
                restore_disk(prepared.restore.as_ref(), &phases),
            );
            disks.map(|(base, writable, checkpoint)| Disks {
                base: base.map(|base| base.file),
                writable: Some(writable),
                checkpoint,
            })
        };
        let (birth, mut files) = tokio::try_join!(birth, disks)?;
        if prepared.rootfs.read_only {
            files.base = files.writable.take();
        }
        match self.create_held(&prepared, id, &birth.vm, &files).await {
            Err(error) if birth.origin.is_clone() && error.is_loss_of_the_vm() => {
                let birth = self.boot_instead(&prepared, birth, &error).await?;
                self.create_held(&prepared, id, &birth.vm, &files).await
            }
            created => created,
        }
    }

    fn prepare_twin(&self, container: &Container, dir: &Path) -> Result<Prepared, PodError> {
        let create = Create {
            id: container.id.clone(),
            bundle: container.bundle.clone(),
            rootfs: container.rootfs.clone(),
            checkpoint: Some(dir.to_owned()),
            ..Create::default()
        };
        let mut prepared = self.prepare(&create)?;
        // All of the memory is to be read.
        prepared.config.restore.lazy = false;
        if let Some(LayerTarget::Whole(_)) = prepared.rootfs.target {
            // All of it is in the directory, and the disk that the container writes to is not asked what is below it.
            prepared.rootfs.target = None;
        }
        Ok(prepared)
    }

    async fn create_held(
        &self,
        prepared: &Prepared,
        id: &str,
        vm: &crate::vm::Vm,
        files: &Disks<File, ImageDisk>,
    ) -> Result<(), PodError> {
        let injected = create::read_injected(&prepared.guest.injected)?;
        let (disks, agent) = create::ready(vm, id, files, &Phases::default()).await?;
        let Some((restore, disk)) = prepared.restore.as_ref().zip(files.checkpoint.as_ref()) else {
            return Ok(());
        };
        let stdio = Stdio { terminal: restore.has_terminal(), ..Default::default() };
        let vcpus = self.vm_vcpus();
        let spec = prepared.guest.for_vm(vcpus);
        let mut request = create::request(id, &spec, &disks, stdio, injected)?;
        let from = restore.request(disks.checkpoint, prepared.config.restore, &spec, vcpus);
        request.checkpoint = MessageField::some(from);
        let created = agent.create_container(request).await;
        created.map(drop).map_err(|source| restore.refused(disk, source))
    }
}
