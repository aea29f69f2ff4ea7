//! The root file system of a container: an overlay of a shared read-only disk and a private writable one, or one disk.
//!
//! ```text
//!   <dir>/base     ext4, read-only, never replayed: the same blocks are mounted by other VMs
//!   <dir>/rw       ext4, with upper/ and work/
//!   <dir>/rootfs   overlay of both; or the one disk
//! ```

mod origin;

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::{MetadataExt as _, chown},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::syncfs,
};

use crate::{
    disk::{Disk, DiskError, Layers},
    sys,
};

/// Directories of the writable disk.
const UPPER: &str = "upper";
const WORK: &str = "work";

#[derive(Debug)]
pub(crate) struct Rootfs {
    path: PathBuf,
    layers: [PathBuf; 2],
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Overlay,
    ReadOnly,
    Whole,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("{device} holds no usable ext4 file system: cannot mount it as the {layer} layer")]
    Mount { layer: &'static str, device: PathBuf, source: Errno },
    #[error("cannot mount the overlay {path}")]
    Overlay { path: PathBuf, source: Errno },
    #[error("cannot reset the overlay's index on {path}")]
    Index { path: PathBuf, source: io::Error },
    #[error("cannot {action} {path}")]
    Freeze { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot write back {path}")]
    Sync { path: PathBuf, source: io::Error },
    #[error("cannot unmount {path}")]
    Unmount { path: PathBuf, source: io::Error },
}

impl Rootfs {
    /// Mounts it below `dir`.
    ///
    /// # Errors
    /// What was mounted is unmounted again.
    pub(crate) fn mount(dir: &Path, disks: &Layers<Disk>) -> Result<Self, RootfsError> {
        let kind = match disks {
            Layers::Overlay { .. } => Kind::Overlay,
            Layers::ReadOnly(_) => Kind::ReadOnly,
            Layers::Whole(_) => Kind::Whole,
        };
        let rootfs = Self { path: dir.join("rootfs"), layers: [dir.join("rw"), dir.join("base")], kind };
        let mounted = match disks {
            Layers::Overlay { base, writable } => rootfs.mount_overlay(base, writable),
            // Nobody else has it mounted, and what an earlier VM has left unfinished is finished now.
            Layers::ReadOnly(disk) => mount_disk("only", disk, &rootfs.path, MsFlags::MS_RDONLY, ""),
            Layers::Whole(disk) => {
                mount_disk("only", disk, &rootfs.path, MsFlags::MS_NOATIME, "noinit_itable")
            }
        };
        mounted.inspect_err(|_| {
            if let Err(err) = rootfs.unmount() {
                crate::console::say(&crate::console::chain(&err));
            }
        })?;
        Ok(rootfs)
    }

    fn mount_overlay(&self, base: &Disk, writable: &Disk) -> Result<(), RootfsError> {
        let [rw, lower] = &self.layers;
        mount_disk("base", base, lower, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME, "noload")?;
        // The host has written all inode tables; there is nothing for the kernel to do in the background.
        mount_disk("writable", writable, rw, MsFlags::MS_NOATIME, "noinit_itable")?;
        let (upper, work) = (rw.join(UPPER), rw.join(WORK));
        if make_dir(&upper)? {
            like_the_image(&upper, lower)
                .map_err(|source| RootfsError::Create { path: upper.clone(), source })?;
        }
        let failed = |source| RootfsError::Index { path: rw.clone(), source };
        make_dir(&self.path)?;
        // Of a disk that was written without an index, nothing says which lower layer its marks are about.
        if !make_dir(&work)? && !origin::is_marked(&upper).map_err(failed)? {
            origin::forget(&upper).map_err(failed)?;
        }
        match overlay(lower, rw, &self.path) {
            // The disk was used with another base disk, whose files have other numbers.
            Err(Errno::ESTALE) => {
                forget_index(rw).map_err(failed)?;
                overlay(lower, rw, &self.path)
            }
            mounted => mounted,
        }
        .map_err(|source| RootfsError::Overlay { path: self.path.clone(), source })
    }

    /// Where the container's root is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the overlay keeps what the container writes; None where there is no overlay.
    pub(crate) fn upper(&self) -> Option<PathBuf> {
        (self.kind == Kind::Overlay).then(|| self.layers[0].join(UPPER))
    }

    /// Brings a disk that is the whole root file system to a state that others can read, until [`Rootfs::thaw`]: whoever
    /// writes waits. Others need none of it, since what was written is sent to the host.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn freeze(&self) -> Result<(), RootfsError> {
        self.when_whole("freeze", |root| sys::freeze_file_system(root, true))
    }

    /// # Errors
    /// Those of ioctl(2).
    pub(crate) fn thaw(&self) -> Result<(), RootfsError> {
        self.when_whole("thaw", |root| sys::freeze_file_system(root, false))
    }

    fn when_whole(
        &self,
        action: &'static str,
        act: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<(), RootfsError> {
        if self.kind != Kind::Whole {
            return Ok(());
        }
        let acted = fs::File::open(&self.path).and_then(|root| act(root.as_fd()));
        acted.map_err(|source| RootfsError::Freeze { action, path: self.path.clone(), source })
    }

    /// Writes everything to the disk. Unmounting alone does not: the mounts of a container that has just ended go
    /// away a little later than its processes, and the file system with the last of them.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn sync(&self) -> Result<(), RootfsError> {
        let rw = match self.kind {
            Kind::Overlay => &self.layers[0],
            Kind::Whole => &self.path,
            Kind::ReadOnly => return Ok(()),
        };
        let failed = |source| RootfsError::Sync { path: rw.clone(), source };
        match fs::File::open(rw) {
            Ok(rw) => syncfs(rw).map_err(|err| failed(err.into())),
            // Unmounted and removed by an earlier try.
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(failed(err)),
        }
    }

    /// Unmounts what is mounted and removes the mount points. May be called again.
    ///
    /// # Errors
    /// Something still uses it.
    pub(crate) fn unmount(&self) -> Result<(), RootfsError> {
        for path in std::iter::once(&self.path).chain(&self.layers) {
            let failed = |source| RootfsError::Unmount { path: path.clone(), source };
            match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
                // Not mounted, or not even made.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(err) => return Err(failed(err.into())),
            }
            match fs::remove_dir(path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(failed(err)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Files have handles (name_to_handle_at(2)) that stay the same when they are copied up, which takes an index. Without them
/// CRIU cannot save what watches a file (inotify(7)).
fn overlay(lower: &Path, rw: &Path, target: &Path) -> Result<(), Errno> {
    // Container ids, the only variable part, have no character that means something to overlayfs.
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=on,nfs_export=on",
        lower.display(),
        rw.join(UPPER).display(),
        rw.join(WORK).display()
    );
    mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_NOATIME, Some(options.as_str()))
}

/// Makes the kernel build the index anew, which is no part of the files.
fn forget_index(rw: &Path) -> io::Result<()> {
    match fs::remove_dir_all(rw.join(WORK).join("index")) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    origin::forget(&rw.join(UPPER))
}

fn mount_disk(
    layer: &'static str,
    disk: &Disk,
    target: &Path,
    flags: MsFlags,
    options: &str,
) -> Result<(), RootfsError> {
    make_dir(target)?;
    let (source, result) = match disk {
        Disk::Block { device, .. } => (
            device,
            mount(Some(device), target, Some("ext4"), flags, (!options.is_empty()).then_some(options)),
        ),
        Disk::Directory(dir) => (dir, mount(Some(dir), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)),
    };
    result.map_err(|err| RootfsError::Mount { layer, device: source.clone(), source: err })
}

/// Whether the directory is new.
fn make_dir(path: &Path) -> Result<bool, RootfsError> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(RootfsError::Create { path: path.to_owned(), source }),
    }
}

/// An overlay's root has the owner and mode of the upper directory, so a fresh one gets the image's.
fn like_the_image(upper: &Path, image: &Path) -> io::Result<()> {
    let of_image = fs::metadata(image)?;
    chown(upper, Some(of_image.uid()), Some(of_image.gid()))?;
    fs::set_permissions(upper, of_image.permissions())
}
