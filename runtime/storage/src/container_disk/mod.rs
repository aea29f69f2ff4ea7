//! The writable disk of a container: which file it is, how it is opened, and who removes it.
//!
//! ```text
//!   plan        the disk                                       its changes go to
//!   Upper       next to the snapshot's upper directory         that directory
//!   Whole       <rootdisk.dir>/layers, labelled ([`native`])   the whole root file system
//!   InPlace     the same; one for each container               a directory of the user's, which stays in place
//!   Unexported  in the bundle                                  no snapshot: they end with the bundle
//!   Existing    the caller's own ([`blockfile`])               the disk is the snapshot
//! ```
//! The life of a disk that has a snapshot to be exported to:
//! ```text
//!   open     disk exists   -> used as it is: its changes were not exported when an earlier container ended
//!            no disk       -> created, empty or with the content of the snapshot's upper directory
//!   pause    exported; the disk stays, because the container continues
//!   end      exported, or nothing was written -> ContainerDisk::discard removes the disk
//!            not exported (VM or shim killed, host full) -> disk stays
//! ```
//! The existence of the disk is thus the mark that the snapshot is incomplete. Three events remove a disk:
//!
//! - [`PendingDisk`] is dropped: the container was not created, so nothing was written to its new disk.
//! - [`ContainerDisk::discard`]: the pod calls it when the container's changes are on stable storage.
//! - [`ContainerDiskPlan::open`] removes the labelled disks whose directory is gone. The snapshotter removes a
//!   disk that is next to an upper directory, and the owner of a bundle the one in the bundle.

mod archived;
mod blank;
mod blockfile;
mod copy;
mod error;
mod native;
mod seed;
mod upper;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use machinen_base::{
    fs::{FileError, remove_if_exists},
    space::DiskReserve,
};

use self::native::NativeDisks;
pub use self::{
    archived::{from_archive, sweep_archives},
    blank::scratch,
    copy::unnamed_copy,
    error::ContainerDiskError,
};
use crate::{
    layer::{self, AppliedLayer, EarlierExports, LayerError, LayerLimits, LayerTarget, PreviousLayer},
    rootdisk::{Rootdisk, RootdiskCache, RootdiskError, RootdiskKey},
};

/// How new disks are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerDiskOptions {
    /// The directory of the cache of base disks, which also has the empty file systems to start from.
    pub cache: PathBuf,
    /// Size of a new disk, bytes.
    pub size: u64,
    /// mke2fs, a path or a name in PATH.
    pub mke2fs: PathBuf,
    /// What a new disk leaves free of its file system.
    pub reserve: DiskReserve,
}

/// Which disk a container writes to, and what receives its changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerDiskPlan {
    /// The changes of an overlay. The disk is removed with the snapshot, and the next start on the snapshot
    /// finds the disk.
    Upper {
        /// Path of the disk.
        path: PathBuf,
        /// The upper directory of the overlay.
        upper: PathBuf,
        /// Where the overlay is mounted, if it is.
        mount: Option<PathBuf>,
    },
    /// The changes of a whole root file system, as the native snapshotter provides it.
    Whole {
        /// The directory with the root file system. The path of the disk follows from this path.
        root: PathBuf,
    },
    /// The changes of a root file system that is a directory of the user's. Several containers can have the same one
    /// at a time, each with a disk of its own.
    InPlace {
        /// The directory, without symbolic links in its path.
        root: PathBuf,
    },
    /// The changes stay on the disk, since the root file system is read-only on the host.
    Unexported {
        /// Path of the disk.
        path: PathBuf,
    },
    /// The disk exists, and holds the whole root file system.
    Existing {
        /// Path of the disk.
        path: PathBuf,
        /// The container must not change the disk.
        read_only: bool,
    },
}

impl ContainerDiskPlan {
    /// Receives the container's changes when it ends or is paused. None: they stay on the disk.
    pub fn target(&self) -> Option<LayerTarget> {
        match self {
            Self::Upper { upper, mount: Some(mount), .. } => {
                Some(LayerTarget::MountedUpper { upper: upper.clone(), mount: mount.clone() })
            }
            Self::Upper { upper, .. } => Some(LayerTarget::Upper(upper.clone())),
            Self::Whole { root } => Some(LayerTarget::Whole(root.clone())),
            Self::InPlace { root } => Some(LayerTarget::InPlace(root.clone())),
            Self::Unexported { .. } | Self::Existing { .. } => None,
        }
    }

    /// The directory or disk that has the container's changes after the container has ended.
    pub fn snapshot(&self) -> &Path {
        match self {
            Self::Upper { upper: path, .. }
            | Self::Whole { root: path }
            | Self::InPlace { root: path }
            | Self::Unexported { path }
            | Self::Existing { path, .. } => path,
        }
    }

    /// Opens the disk that an earlier container on the same snapshot has left, or creates one. Returns the disk
    /// as the VM gets it, and the claim to it. Blocks.
    ///
    /// # Errors
    /// The disk cannot be opened or created, or what killed exports have left cannot be removed.
    pub fn open(&self, options: &ContainerDiskOptions) -> Result<(File, PendingDisk), ContainerDiskError> {
        if let Self::Existing { path, read_only } = self {
            return Ok((blockfile::open(path, *read_only)?, PendingDisk::new(None, path, false)));
        }
        let target = self.target();
        if let Some(target) = &target {
            layer::sweep(target.path())?;
        }
        if let Some(LayerTarget::InPlace(root)) = &target {
            layer::sweep_within(root)?;
        }
        // Locked until a new disk has its label.
        let labelled = match self {
            Self::Whole { root } | Self::InPlace { root } => Some((NativeDisks::lock(&options.cache)?, root)),
            _ => None,
        };
        let path = match (self, &labelled) {
            (Self::InPlace { root }, Some((disks, _))) => {
                disks.unused(&options.cache, root).map_err(FileError::at("find a disk for", root))?
            }
            _ => self.path(&options.cache),
        };
        let (file, created) = match path.exists() {
            true => (open_remaining(&path)?, false),
            false => (self.create(&path, options)?, true),
        };
        let mut pending = PendingDisk::new(target, &path, created);
        if !created {
            let shown = path.display();
            tracing::info!(path = %shown, "the container's disk has changes that its snapshot lacks: the disk is used");
            native::mark_in_use(&file).map_err(FileError::at("lock", &path))?;
        } else if let Some((_, root)) = labelled {
            native::mark_in_use(&file)
                .and_then(|()| native::label(&file, root, None))
                .map_err(FileError::at("label", &path))?;
        }
        if let Self::InPlace { .. } = self {
            pending.in_use = Some(file.try_clone().map_err(FileError::at("open", &path))?);
        }
        Ok((file, pending))
    }

    /// The base disk below the disk that an earlier container has left, where that matters: a whole root file
    /// system may have received some of the changes since. Blocks.
    ///
    /// # Errors
    /// The label of the disk, or the cache, cannot be read.
    pub fn base_of_remaining_disk(&self, cache: &RootdiskCache) -> Result<Option<Rootdisk>, RootdiskError> {
        let Self::Whole { root } = self else { return Ok(None) };
        let path = self.path(cache.dir());
        let base = native::base_of(&path, root).map_err(FileError::at("read the label of", &path))?;
        let Some(key) = base else { return Ok(None) };
        let found = cache.get(key)?;
        if found.is_none() {
            let (root, disk) = (root.display(), path.display());
            tracing::warn!(%disk, "the base disk {key} of a disk is missing: the present content of {root} is used");
        }
        Ok(found)
    }

    /// Makes an unnamed disk with the changes that the snapshot has, for a VM that writes to it. The snapshot
    /// must not change meanwhile. Blocks.
    ///
    /// # Errors
    /// The snapshot cannot be read, there is no space or no mke2fs.
    pub fn unnamed(&self, options: &ContainerDiskOptions) -> Result<File, ContainerDiskError> {
        match self {
            Self::Upper { upper, .. } if upper::was_written(upper)? => seed::unnamed(upper, options),
            // The changes are part of the base disk.
            _ => scratch(options),
        }
    }

    fn path(&self, cache: &Path) -> PathBuf {
        match self {
            Self::Whole { root } | Self::InPlace { root } => native::path(cache, root),
            Self::Upper { path, .. } | Self::Unexported { path } | Self::Existing { path, .. } => {
                path.clone()
            }
        }
    }

    fn create(&self, path: &Path, options: &ContainerDiskOptions) -> Result<File, ContainerDiskError> {
        match self {
            Self::Upper { upper, .. } if upper::was_written(upper)? => seed::create(path, upper, options),
            _ => blank::create(path, options),
        }
    }
}

/// The disk of a container that is being created. A disk that was created for the container is removed if
/// this is dropped before [`PendingDisk::keep`], since nothing has been written to it then.
#[derive(Debug)]
pub struct PendingDisk {
    target: Option<LayerTarget>,
    path: PathBuf,
    created: bool,
    /// Keeps containers with the same directory from the disk.
    in_use: Option<File>,
}

impl PendingDisk {
    fn new(target: Option<LayerTarget>, path: &Path, created: bool) -> Self {
        Self { target, path: path.to_owned(), created, in_use: None }
    }

    /// The container exists, and the disk belongs to it from now on. `base` is the base disk below the
    /// changes.
    pub fn keep(mut self, base: Option<RootdiskKey>) -> ContainerDisk {
        let clean = std::mem::take(&mut self.created);
        let in_use = Arc::new(Mutex::new(self.in_use.take()));
        let disk = ContainerDisk { target: self.target.take(), path: self.path.clone(), clean, in_use };
        if clean {
            disk.record_base(base);
        }
        disk
    }
}

impl Drop for PendingDisk {
    fn drop(&mut self) {
        if self.created
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), "cannot remove an unused disk: {error}");
        }
    }
}

/// The disk of a container that exists.
#[derive(Debug, Clone)]
pub struct ContainerDisk {
    target: Option<LayerTarget>,
    path: PathBuf,
    clean: bool,
    /// As long as this is open, other containers with the same directory have other disks.
    in_use: Arc<Mutex<Option<File>>>,
}

impl ContainerDisk {
    /// Path of the disk.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the container's changes. None: they exist on the disk only.
    pub fn target(&self) -> Option<&LayerTarget> {
        self.target.as_ref()
    }

    /// Whether the disk started with nothing but the content of the snapshot.
    pub fn is_clean(&self) -> bool {
        self.clean
    }

    /// Stores the archive with the container's changes in the target. None: the disk has no target. `before` is the
    /// layer before the container's first export, if this is not the first one. Blocks.
    ///
    /// # Errors
    /// Those of [`layer::store`], or the label of the disk cannot be written.
    pub fn export(
        &self,
        archive: impl Read + Send,
        before: Option<OwnedFd>,
        limits: LayerLimits,
    ) -> Result<Option<(AppliedLayer, PreviousLayer)>, LayerError> {
        let Some(target) = &self.target else { return Ok(None) };
        let stored = layer::store(
            archive,
            target,
            EarlierExports { before, record: &native::record(&self.path) },
            limits,
        )?;
        // The disk of a whole root file system belongs to the new directory.
        if let LayerTarget::Whole(root) = target {
            native::relabel(&self.path, root).map_err(FileError::at("label", &self.path))?;
        }
        Ok(Some(stored))
    }

    /// Removes the disk, which is no longer used. Blocks.
    ///
    /// # Errors
    /// The disk cannot be removed.
    pub fn discard(&self) -> Result<(), FileError> {
        remove_if_exists(&self.path).map(drop).map_err(FileError::at("remove", &self.path))?;
        if let Some(LayerTarget::InPlace(_)) = self.target {
            let record = native::record(&self.path);
            remove_if_exists(&record).map(drop).map_err(FileError::at("remove", &record))?;
        }
        // Frees the disk's space.
        drop(self.in_use.lock().unwrap_or_else(PoisonError::into_inner).take());
        Ok(())
    }

    fn record_base(&self, base: Option<RootdiskKey>) {
        let Some(LayerTarget::Whole(root)) = &self.target else { return };
        let labelled = File::open(&self.path).and_then(|disk| native::label(&disk, root, base));
        if let Err(error) = labelled {
            let disk = self.path.display();
            tracing::warn!(%disk, "cannot record the base disk of a container's disk: {error}");
        }
    }
}

/// Opens the disk that an earlier container wrote to.
fn open_remaining(path: &Path) -> Result<File, ContainerDiskError> {
    let file = File::options().read(true).write(true).open(path).map_err(FileError::at("open", path))?;
    let other = |what| ContainerDiskError::NotWritable { path: path.to_owned(), what };
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => other("is too short"),
        _ => FileError::new("read", path, error).into(),
    })?;
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return Err(other("is not an ext4 file system"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
