//! The view of a container's files where its caller has mounted the root file system.
//!
//! dockerd mounts a container's overlay itself, and `docker cp` and `docker export` use that mount while the container
//! runs. They would find the files as they were before the start, and what they write would not reach the container. So
//! a view covers the mount as long as the container exists in the guest. Like the overlay, and unlike the view below
//! `/proc/PID/root`, it shows nothing that is mounted in the container. The overlay appears again before the container's
//! end is reported.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, create_private_dirs, if_exists, remove_if_exists};
use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, move_mount},
};
use tokio::task::{JoinError, spawn_blocking};

use super::mounted;
use crate::view::{ContainerView, DeviceError, MOUNT_TYPE, ViewGuest};

/// Directory with a file for each mount that is covered, in a pod's state directory. The file is named like the
/// container and holds the path, so that the mount can be removed after the pod's owner was killed.
pub(super) const COVERS_DIR: &str = "covers";

/// A mount that a view covers. It stays covered until [`Cover::remove`].
#[derive(Debug)]
pub(super) struct Cover {
    view: ContainerView,
    mount: PathBuf,
    record: PathBuf,
}

/// Why a mount is not covered.
#[derive(Debug, thiserror::Error)]
pub(super) enum CoverError {
    #[error(transparent)]
    View(#[from] DeviceError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl Cover {
    /// Covers `mount` by the files of a container, which exists in the guest. `record` is the file that remembers it.
    ///
    /// # Errors
    /// The host has no FUSE, the record cannot be written, or the kernel refuses the mount. Nothing is covered then.
    pub(super) async fn make(guest: ViewGuest, mount: PathBuf, record: PathBuf) -> Result<Self, CoverError> {
        let (view, root) = ContainerView::mount(&guest.container)?;
        view.attach(guest);
        let attach = {
            let (mount, record) = (mount.clone(), record.clone());
            move || {
                if let Some(dir) = record.parent() {
                    create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
                }
                fs::write(&record, mount.as_os_str().as_bytes()).map_err(FileError::at("write", &record))?;
                let moved = move_mount(&root, "", CWD, &mount, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
                moved.map_err(io::Error::from).map_err(FileError::at("cover", mount))
            }
        };
        let cover = Self { view, mount, record };
        // The mount is the caller's, and may not answer.
        match spawn_blocking(attach).await.unwrap_or_else(|error| Err(cover.failed("cover", error))) {
            Ok(()) => Ok(cover),
            Err(error) => {
                cover.remove().await?;
                Err(error.into())
            }
        }
    }

    /// Shows what was covered again.
    ///
    /// # Errors
    /// The kernel refuses, or the record cannot be removed.
    pub(super) async fn remove(mut self) -> Result<(), FileError> {
        self.view.end().await;
        uncover(&self.mount)?;
        remove_if_exists(&self.record).map(drop).map_err(FileError::at("remove", self.record))
    }

    fn failed(&self, verb: &'static str, error: JoinError) -> FileError {
        FileError::new(verb, &self.mount, io::Error::other(error))
    }
}

/// Unmounts the view at `mount`, unless something else is mounted there, or nothing.
fn uncover(mount: &Path) -> Result<(), FileError> {
    let failed = |error: io::Error| FileError::new("unmount the view at", mount, error);
    if !mounted::is_of_type(mount, MOUNT_TYPE).map_err(failed)? {
        return Ok(());
    }
    // The view may not answer any more, so nothing is written back.
    umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(|error| failed(error.into()))
}

/// Shows all mounts again that the pod with this state directory has covered. Its owner was killed.
///
/// # Errors
/// One of them cannot be shown, or its record cannot be read. The others are shown.
pub(super) fn uncover_abandoned(state_dir: &Path) -> Result<(), FileError> {
    let dir = state_dir.join(COVERS_DIR);
    let entries = if_exists(fs::read_dir(&dir)).map_err(FileError::at("read", &dir))?;
    let mut first = Ok(());
    for entry in entries.into_iter().flatten() {
        let path = entry.map_err(FileError::at("read", &dir))?.path();
        let uncovered = fs::read(&path)
            .map_err(FileError::at("read", &path))
            .and_then(|mount| uncover(Path::new(&OsString::from_vec(mount))));
        first = first.and(uncovered);
    }
    first
}
