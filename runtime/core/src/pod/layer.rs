//! A container's writable layer: its disk, and how the content of the disk gets into the snapshot.
//!
//! ```text
//!   create   disk exists   -> used as it is: its changes were not exported when an earlier container ended
//!            no disk       -> created, empty or with the content of the snapshot's upper directory
//!   pause    exported; the disk stays, because the container continues
//!   end      exported, or nothing was written -> disk removed
//!            not exported (VM or shim killed, host full) -> disk stays
//! ```
//! The existence of the disk is thus the mark that the snapshot is incomplete.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use machinen_base::{
    error::chain,
    fs::{FileError, if_exists},
};
use machinen_storage::{
    layer::{self, LayerError, LayerLimits, LayerTarget, PreviousLayer},
    rootdisk::{self, Rootdisk, RootdiskCache, RootdiskError, RootdiskKey},
};
use machinen_vm::{Vm, agent};
use tokio::{
    task::spawn_blocking,
    time::{Duration, timeout},
};

use super::{
    PodError,
    native_disk::{self, NativeDisks},
    receive::{ExportLimits, ReceiveError, receive},
    rootfs,
};
use crate::config::{self, Config};

/// Permissions that containerd's overlayfs snapshotter gives a new upper directory. An empty directory with
/// other permissions has been written to.
const FRESH_MODE: u32 = 0o755;

/// The disk of a container that is being created. A disk that was created for the container is removed if
/// this is dropped before [`NewDisk::keep`], since nothing has been written to it then.
#[derive(Debug)]
pub(super) struct NewDisk {
    pub file: Option<File>,
    made: Option<PathBuf>,
}

impl NewDisk {
    /// The disk belongs to the container from now on. Returns true if its content is only that of the
    /// snapshot.
    pub(super) fn keep(mut self) -> bool {
        self.made.take().is_some()
    }
}

impl Drop for NewDisk {
    fn drop(&mut self) {
        if let Some(path) = &self.made
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), "cannot remove an unused disk: {error}");
        }
    }
}

/// The path of a container's disk.
fn disk_path(plan: &rootfs::RootfsPlan, config: &Config) -> PathBuf {
    match &plan.target {
        Some(LayerTarget::Whole(root)) => native_disk::path(&config.rootdisk.dir, root),
        _ => plan.writable.clone(),
    }
}

/// Opens the disk that an earlier container on the same snapshot has left, or creates one.
pub(super) async fn open_disk(plan: &rootfs::RootfsPlan, config: &Config) -> Result<NewDisk, PodError> {
    let (path, plan) = (disk_path(plan, config), plan.clone());
    let size = config.rootdisk.writable_size_mib << 20;
    let config::RootdiskConfig { dir, mke2fs, .. } = config.rootdisk.clone();
    let open = move || -> Result<NewDisk, PodError> {
        let failed = |source| RootdiskError::Writable { path: path.clone(), source };
        if plan.source.is_none() {
            let file = File::options().read(true).write(!plan.read_only).open(&path).map_err(failed)?;
            return Ok(NewDisk { file: Some(file), made: None });
        }
        if let Some(target) = &plan.target {
            layer::sweep(target.path()).map_err(PodError::Layer)?;
        }
        let _disks = match &plan.target {
            Some(LayerTarget::Whole(_)) => Some(NativeDisks::lock(&dir).map_err(failed)?),
            _ => None,
        };
        if path.exists() {
            let shown = path.display();
            tracing::info!(path = %shown, "the container's disk has changes that its snapshot lacks: the disk is used");
            let file = rootdisk::open_writable(&path)?;
            native_disk::mark_in_use(&file).map_err(failed)?;
            return Ok(NewDisk { file: Some(file), made: None });
        }
        let cache = RootdiskCache::open(&dir)?;
        let file = match &plan.target {
            Some(LayerTarget::Upper(upper)) if was_written(upper)? => {
                cache.seed_writable(&path, size, upper, &mke2fs)?
            }
            _ => cache.create_writable(&path, size, &mke2fs)?,
        };
        if let Some(LayerTarget::Whole(root)) = &plan.target {
            native_disk::mark_in_use(&file)
                .and_then(|()| native_disk::label(&file, root, None))
                .map_err(failed)?;
        }
        Ok(NewDisk { file: Some(file), made: Some(path) })
    };
    spawn_blocking(open).await.map_err(PodError::Worker)?
}

/// Returns the base disk below a disk that an earlier container has left, where that matters: a whole root
/// file system may have received some of the changes since. Blocks.
pub(super) fn base_of_existing_disk(
    plan: &rootfs::RootfsPlan,
    config: &Config,
    cache: &RootdiskCache,
) -> Result<Option<Rootdisk>, RootdiskError> {
    let Some(LayerTarget::Whole(root)) = &plan.target else { return Ok(None) };
    let path = disk_path(plan, config);
    let base = native_disk::base_of(&path, root)
        .map_err(|source| RootdiskError::Writable { path: path.clone(), source })?;
    let Some(key) = base else { return Ok(None) };
    let found = cache.get(key)?;
    if found.is_none() {
        let root = root.display();
        let disk = path.display();
        tracing::warn!(%disk, "the base disk {key} of a disk is missing: the present content of {root} is used");
    }
    Ok(found)
}

/// Returns a disk with the content that the container's disk had at its checkpoint, for a VM that writes to
/// it. `copy` is the copy of [`WritableLayer::only_disk`]. Without it the snapshot has all of the content,
/// and the caller keeps `upper` from being exchanged.
pub(super) async fn trial_disk(
    plan: &rootfs::RootfsPlan,
    config: &Config,
    copy: Option<File>,
) -> Result<File, PodError> {
    if let Some(copy) = copy {
        return Ok(copy);
    }
    let target = plan.target.clone();
    let size = config.rootdisk.writable_size_mib << 20;
    let config::RootdiskConfig { dir, mke2fs, .. } = config.rootdisk.clone();
    let make = move || {
        let cache = RootdiskCache::open(&dir)?;
        match target {
            Some(LayerTarget::Upper(upper)) if was_written(&upper)? => {
                cache.unnamed_seeded(size, &upper, &mke2fs)
            }
            // The changes are part of the base disk now.
            _ => cache.unnamed_writable(size, &mke2fs),
        }
    };
    Ok(spawn_blocking(make).await.map_err(PodError::Worker)??)
}

fn was_written(upper: &Path) -> Result<bool, RootdiskError> {
    let failed = |source| RootdiskError::Writable { path: upper.to_owned(), source };
    let mode = fs::metadata(upper).map_err(failed)?.permissions().mode() & 0o7777;
    Ok(mode != FRESH_MODE || fs::read_dir(upper).map_err(failed)?.next().is_some())
}

/// The layer of a container that exists.
#[derive(Debug)]
pub(super) struct WritableLayer {
    target: Option<LayerTarget>,
    disk: PathBuf,
    limits: ExportLimits,
    /// The disk started as a copy of the snapshot's content.
    clean: bool,
    /// One export at a time.
    exporting: tokio::sync::Mutex<()>,
}

/// Proof that the snapshot has everything that the container has written.
#[derive(Debug)]
pub(super) struct ExportedLayer {
    /// The previous content of the snapshot, if it was exchanged.
    replaced: Option<PreviousLayer>,
}

impl WritableLayer {
    /// `base`: the base disk below the changes; `clean`: the result of [`NewDisk::keep`].
    pub(super) fn new(
        plan: &rootfs::RootfsPlan,
        config: &Config,
        base: Option<RootdiskKey>,
        clean: bool,
    ) -> Self {
        let layer = LayerLimits {
            entries: config.rootdisk.layer_max_entries,
            bytes: config.rootdisk.writable_size_mib << 20,
        };
        let time = Duration::from_secs(config.rootdisk.export_timeout_s);
        let limits = ExportLimits { layer, time };
        let (target, disk) = (plan.target.clone(), disk_path(plan, config));
        if let (Some(LayerTarget::Whole(root)), true) = (&target, clean) {
            let labelled = File::open(&disk).and_then(|disk| native_disk::label(&disk, root, base));
            if let Err(error) = labelled {
                let disk = disk.display();
                tracing::warn!(%disk, "cannot record the base disk of a container's disk: {error}");
            }
        }
        Self { target, disk, limits, clean, exporting: tokio::sync::Mutex::default() }
    }

    /// The path of the disk, if the container's changes exist nowhere else.
    pub(super) fn only_disk(&self) -> Option<&Path> {
        self.target.is_none().then_some(&*self.disk)
    }

    /// Keeps the snapshot unchanged until the guard is dropped.
    pub(super) async fn hold(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.exporting.lock().await
    }

    /// The identity of the directory with the layer; see [`layer::identity`].
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(super) fn identity(&self) -> Result<Option<String>, LayerError> {
        self.target.as_ref().map(|target| layer::identity(target.path())).transpose()
    }

    /// Copies what the container has written to its snapshot. The container has ended, or its processes are
    /// frozen. The export fails when `killed` resolves.
    ///
    /// # Errors
    /// The export failed; the snapshot is unchanged.
    pub(super) async fn export(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        killed: impl Future<Output = ()>,
    ) -> Result<Option<ExportedLayer>, ReceiveError> {
        let Some(target) = self.target.clone() else { return Ok(None) };
        let turn = timeout(self.limits.time, self.exporting.lock());
        let _one = turn.await.map_err(|_| ReceiveError::Deadline { limit: self.limits.time })?;
        let (applied, replaced) = receive(vm, agent, id, target.clone(), self.limits, killed).await?;
        if let LayerTarget::Whole(root) = &target {
            // The directory was exchanged for another one, which the disk belongs to now.
            native_disk::relabel(&self.disk, root)
                .map_err(|source| LayerError::from(FileError::new("label", &self.disk, source)))?;
        }
        tracing::info!(
            id,
            entries = applied.entries,
            bytes = applied.bytes,
            "the container's writes are in its snapshot"
        );
        Ok(Some(ExportedLayer { replaced: Some(replaced) }))
    }

    /// Like [`WritableLayer::export`], for a container that has ended. A failure is logged, and the changes
    /// stay on the disk.
    pub(super) async fn export_at_end(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        unchanged: bool,
    ) -> Option<ExportedLayer> {
        if unchanged && self.clean {
            return Some(ExportedLayer { replaced: None });
        }
        let never = std::future::pending();
        self.export(vm, agent, id, never).await.unwrap_or_else(|error| {
            let disk = self.disk.display();
            tracing::error!(
                id,
                "the container's writes could not be exported to its snapshot and are kept in {disk}: {}",
                chain(&error)
            );
            None
        })
    }

    /// Waits until the exported files are on stable storage and removes the previous content of the snapshot.
    /// Returns whether the disk is no longer needed.
    pub(super) async fn secure(&self, saved: Option<ExportedLayer>) -> bool {
        let Some(saved) = saved else { return false };
        // Without an exchange there is nothing to sync, and no thread is needed.
        let Some(replaced) = saved.replaced else { return true };
        match spawn_blocking(move || replaced.sync()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!(disk = %self.disk.display(), "a container's disk is kept: {}", chain(&error));
                false
            }
            Err(error) => {
                tracing::warn!(disk = %self.disk.display(), "a container's disk is kept: {error}");
                false
            }
        }
    }

    /// Removes the disk, which is no longer used.
    pub(super) async fn discard_disk(&self) {
        if let Err(error) = if_exists(tokio::fs::remove_file(&self.disk).await) {
            tracing::warn!(disk = %self.disk.display(), "cannot remove a container's disk: {error}");
        }
    }
}
