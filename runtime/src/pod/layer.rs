//! A container's writable layer: its disk, and how what is on it gets into the snapshot.
//!
//! ```text
//!   create   disk there  -> used as it is: an earlier end did not get its writes to the snapshot
//!            none there  -> made, empty or with what the snapshot's upper directory has
//!   pause    exported; the disk stays, as the container goes on
//!   end      exported, or nothing was written -> disk removed
//!            not exported (VM or shim killed, host full) -> disk stays
//! ```
//! So the disk's existence is its dirty mark, and the snapshot is complete when there is none.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tokio::task::spawn_blocking;

use super::{
    PodError,
    beside::{self, Disks},
    rootfs,
};
use crate::{
    agent,
    config::{self, Config},
    error::chain,
    layer::{self, LayerError, LayerLimits, LayerTarget, PreviousLayer},
    rootdisk::{self, Rootdisk, RootdiskCache, RootdiskError, RootdiskKey},
    vm::Vm,
};

/// Permissions that containerd's overlayfs snapshotter gives a new upper directory. An empty one with others has been
/// written to.
const FRESH_MODE: u32 = 0o755;

/// The disk of a container that is being created. One that was made for it is removed if it is dropped before
/// [`NewDisk::keep`]: nothing has been written to it then.
#[derive(Debug)]
pub(super) struct NewDisk {
    pub file: Option<File>,
    made: Option<PathBuf>,
}

impl NewDisk {
    /// The disk is the container's from now on. True if it has nothing but what is in the snapshot.
    pub fn keep(mut self) -> bool {
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

/// Where the disk of a container is.
fn disk_path(plan: &rootfs::Plan, config: &Config) -> PathBuf {
    match &plan.target {
        Some(LayerTarget::Whole(root)) => beside::path(&config.rootdisk.dir, root),
        _ => plan.writable.clone(),
    }
}

/// Opens the disk that an earlier container on the same snapshot left, or makes one.
pub(super) async fn open_disk(plan: &rootfs::Plan, config: &Config) -> Result<NewDisk, PodError> {
    let (path, plan) = (disk_path(plan, config), plan.clone());
    let size = config.rootdisk.writable_size_mib << 20;
    let config::Rootdisk { dir, mke2fs, .. } = config.rootdisk.clone();
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
            Some(LayerTarget::Whole(_)) => Some(Disks::lock(&dir).map_err(failed)?),
            _ => None,
        };
        if path.exists() {
            tracing::info!(path = %path.display(), "the container's disk has writes that its snapshot lacks: used as it is");
            let file = rootdisk::open_writable(&path)?;
            beside::mark_used(&file).map_err(failed)?;
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
            beside::mark_used(&file).and_then(|()| beside::label(&file, root, None)).map_err(failed)?;
        }
        Ok(NewDisk { file: Some(file), made: Some(path) })
    };
    spawn_blocking(open).await.map_err(PodError::Worker)?
}

/// The base disk that is under the writes of a disk that an earlier container left, where that matters: a whole root file
/// system may have got some of the writes since. Blocks.
pub(super) fn base_of_left_disk(
    plan: &rootfs::Plan,
    config: &Config,
    cache: &RootdiskCache,
) -> Result<Option<Rootdisk>, RootdiskError> {
    let Some(LayerTarget::Whole(root)) = &plan.target else { return Ok(None) };
    let path = disk_path(plan, config);
    let base = beside::base_of(&path, root)
        .map_err(|source| RootdiskError::Writable { path: path.clone(), source })?;
    let Some(key) = base else { return Ok(None) };
    let found = cache.get(key)?;
    if found.is_none() {
        let root = root.display();
        tracing::warn!(disk = %path.display(), "the base disk {key} of a container's disk is gone: {root} is taken as it is now");
    }
    Ok(found)
}

/// A disk like the container's was when its checkpoint was taken, for another VM to write to. `copy` is that of
/// [`Layer::only_disk`]; otherwise the snapshot has all of it, and `upper` must not be exchanged meanwhile.
pub(super) async fn twin_disk(
    plan: &rootfs::Plan,
    config: &Config,
    copy: Option<File>,
) -> Result<File, PodError> {
    if let Some(copy) = copy {
        return Ok(copy);
    }
    let target = plan.target.clone();
    let size = config.rootdisk.writable_size_mib << 20;
    let config::Rootdisk { dir, mke2fs, .. } = config.rootdisk.clone();
    let make = move || {
        let cache = RootdiskCache::open(&dir)?;
        match target {
            Some(LayerTarget::Upper(upper)) if was_written(&upper)? => {
                cache.unnamed_seeded(size, &upper, &mke2fs)
            }
            // What was written is in the base disk by now.
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
pub(super) struct Layer {
    target: Option<LayerTarget>,
    disk: PathBuf,
    limits: LayerLimits,
    /// The disk began as a copy of what the snapshot has.
    clean: bool,
    /// One export at a time.
    exporting: tokio::sync::Mutex<()>,
}

/// The snapshot has all that the container has written.
#[derive(Debug)]
pub(super) struct Saved {
    /// The layer that the snapshot had before, if it was exchanged.
    replaced: Option<PreviousLayer>,
}

impl Layer {
    /// `base`: what the disk's writes are over; `clean`: see [`NewDisk::keep`].
    pub fn new(plan: &rootfs::Plan, config: &Config, base: Option<RootdiskKey>, clean: bool) -> Self {
        let limits = LayerLimits {
            entries: config.rootdisk.layer_max_entries,
            bytes: config.rootdisk.writable_size_mib << 20,
        };
        let (target, disk) = (plan.target.clone(), disk_path(plan, config));
        if let (Some(LayerTarget::Whole(root)), true) = (&target, clean) {
            let labelled = File::open(&disk).and_then(|disk| beside::label(&disk, root, base));
            if let Err(error) = labelled {
                tracing::warn!(disk = %disk.display(), "cannot note what a container's disk is over: {error}");
            }
        }
        Self { target, disk, limits, clean, exporting: tokio::sync::Mutex::default() }
    }

    /// The disk, where nothing else has what the container has written.
    pub fn only_disk(&self) -> Option<&Path> {
        self.target.is_none().then_some(&*self.disk)
    }

    /// Keeps the snapshot as it is until the guard is dropped.
    pub async fn hold(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.exporting.lock().await
    }

    /// Which directory has it; see [`layer::identity`].
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub fn identity(&self) -> Result<Option<String>, LayerError> {
        self.target.as_ref().map(|target| layer::identity(target.path())).transpose()
    }

    /// Brings what the container has written to its snapshot; it has ended, or its processes are frozen.
    ///
    /// # Errors
    /// The snapshot is as it was then.
    pub async fn export(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
    ) -> Result<Option<Saved>, LayerError> {
        let Some(target) = self.target.clone() else { return Ok(None) };
        let _one = self.exporting.lock().await;
        let (applied, replaced) = layer::receive(vm, agent, id, target.clone(), self.limits).await?;
        if let LayerTarget::Whole(root) = &target {
            // The disk stays the directory's, which is another one now.
            beside::relabel(&self.disk, root).map_err(|source| LayerError::Staging {
                action: "label",
                path: self.disk.clone(),
                source,
            })?;
        }
        tracing::info!(
            id,
            entries = applied.entries,
            bytes = applied.bytes,
            "the container's writes are in its snapshot"
        );
        Ok(Some(Saved { replaced: Some(replaced) }))
    }

    /// [`Layer::export`] for a container that has ended. A failure is logged: the writes are on the disk then.
    pub async fn export_at_end(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        unchanged: bool,
    ) -> Option<Saved> {
        if unchanged && self.clean {
            return Some(Saved { replaced: None });
        }
        self.export(vm, agent, id).await.unwrap_or_else(|error| {
            let disk = self.disk.display();
            tracing::error!(
                id,
                "the container's writes did not get to its snapshot and are kept in {disk}: {}",
                chain(&error)
            );
            None
        })
    }

    /// Returns when what was exported has reached the medium, so that the disk is not needed any more; false if that is
    /// not known. Removes what the snapshot had before.
    pub async fn secure(&self, saved: Option<Saved>) -> bool {
        let Some(saved) = saved else { return false };
        // Without an exchange there is nothing to wait for, and no thread to start.
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

    /// Removes the disk, which nothing uses any more.
    pub async fn discard_disk(&self) {
        match tokio::fs::remove_file(&self.disk).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(disk = %self.disk.display(), "cannot remove a container's disk: {error}");
            }
            _ => {}
        }
    }
}
