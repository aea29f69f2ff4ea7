//! The mount of the disk with the images, while they are written or read.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::CriuError;
use crate::disk::Disk;

/// Mount point in the agent's directory of a container.
const DIR: &str = "checkpoint";

/// The mount point of the disk, which is mounted until this is dropped.
#[derive(Debug)]
pub(super) struct ImageMount(PathBuf);

impl ImageMount {
    /// Mounts the disk below `dir`, the agent's directory of the container.
    ///
    /// # Errors
    /// The disk has no such file system.
    pub(super) fn mount(disk: &Disk, dir: &Path, kind: &str, flags: MsFlags) -> Result<Self, CriuError> {
        let at = dir.join(DIR);
        fs::create_dir_all(&at).map_err(|source| CriuError::File {
            what: "create",
            path: at.clone(),
            source,
        })?;
        let mounted = match disk {
            Disk::Block { device, .. } => mount(Some(device), &at, Some(kind), flags, None::<&str>)
                .map_err(|source| CriuError::Mount { device: device.clone(), source }),
            Disk::Directory(path) => mount(Some(path), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|source| CriuError::Mount { device: path.clone(), source }),
        };
        let this = Self(at);
        mounted.map(|()| this)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ImageMount {
    fn drop(&mut self) {
        // A file system that is in use remains mounted until its use ends.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}
