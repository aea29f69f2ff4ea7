//! The root file system of a container: an overlay of a shared read-only disk and a private writable one, or
//! one disk.
//!
//! ```text
//!   <dir>/base     ext4, read-only, its journal is never replayed: other VMs have the same blocks mounted
//!   <dir>/mapped   the same with the owners that a user namespace gives its users, if the container has one
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

use machinen_protocol::disks::RootDisks;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::syncfs,
};

use crate::{
    console,
    disk::{Disk, DiskError},
    engine::{Engine, EngineError, IdMaps},
    sys,
};

/// Directories of the writable disk.
const UPPER: &str = "upper";
const WORK: &str = "work";

#[derive(Debug)]
pub(crate) struct Rootfs {
    path: PathBuf,
    /// Mount points of the writable disk, the base disk with other owners, and the base disk.
    disks: [PathBuf; 3],
    kind: RootfsKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RootfsKind {
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
    #[error("{device} has no usable ext4 file system: cannot mount it as the {role} disk")]
    Mount { role: &'static str, device: PathBuf, source: Errno },
    #[error(transparent)]
    Owners(#[from] Box<EngineError>),
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
    /// Mounts the root file system below `dir`. `owners`: those of the base disk's files, if they are users of a user
    /// namespace.
    ///
    /// # Errors
    /// A file system cannot be mounted; what was mounted before it is unmounted again.
    pub(crate) async fn mount(
        dir: &Path,
        disks: &RootDisks<Disk>,
        owners: Option<(&Engine, IdMaps)>,
    ) -> Result<Self, RootfsError> {
        let kind = match disks {
            RootDisks::Overlay { .. } => RootfsKind::Overlay,
            RootDisks::ReadOnly(_) => RootfsKind::ReadOnly,
            RootDisks::Whole(_) => RootfsKind::Whole,
        };
        let rootfs = Self {
            path: dir.join("rootfs"),
            disks: ["rw", "mapped", "base"].map(|name| dir.join(name)),
            kind,
        };
        let mounted = match disks {
            RootDisks::Overlay { base, writable } => rootfs.mount_overlay(base, writable, owners).await,
            // Only this VM has the disk mounted: a journal that an earlier VM has left is replayed now.
            RootDisks::ReadOnly(disk) => mount_disk("only", disk, &rootfs.path, MsFlags::MS_RDONLY, ""),
            RootDisks::Whole(disk) => {
                mount_disk("only", disk, &rootfs.path, MsFlags::MS_NOATIME, "noinit_itable")
            }
        };
        mounted.inspect_err(|_| {
            if let Err(err) = rootfs.unmount() {
                console::report(&err);
            }
        })?;
        Ok(rootfs)
    }

    async fn mount_overlay(
        &self,
        base: &Disk,
        writable: &Disk,
        owners: Option<(&Engine, IdMaps)>,
    ) -> Result<(), RootfsError> {
        let [rw, mapped, plain] = &self.disks;
        mount_disk("base", base, plain, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME, "noload")?;
        let lower = match owners {
            Some((engine, ids)) => {
                make_dir(mapped)?;
                engine.map_owners(plain, mapped, &ids).await.map_err(Box::new)?;
                mapped
            }
            None => plain,
        };
        // The host has written all inode tables, which the kernel would otherwise do in the background.
        mount_disk("writable", writable, rw, MsFlags::MS_NOATIME, "noinit_itable")?;
        let (upper, work) = (rw.join(UPPER), rw.join(WORK));
        if make_dir(&upper)? {
            copy_root_attributes(&upper, lower)
                .map_err(|source| RootfsError::Create { path: upper.clone(), source })?;
        }
        let failed = |source| RootfsError::Index { path: rw.clone(), source };
        make_dir(&self.path)?;
        // On a disk that was written without an index, nothing records to which lower layer its marks refer.
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

    /// The container's root directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The directory in which the overlay keeps what the container writes; None without an overlay.
    pub(crate) fn upper(&self) -> Option<PathBuf> {
        (self.kind == RootfsKind::Overlay).then(|| self.disks[0].join(UPPER))
    }

    /// Completes a disk that is the whole root file system on stable storage and blocks writers until
    /// [`Rootfs::thaw`], so that the host can copy it. Other root file systems need no freezing, since their
    /// changes are sent to the host.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn freeze(&self) -> Result<(), RootfsError> {
        self.if_whole("freeze", |root| sys::freeze_file_system(root, true))
    }

    /// Lets writers continue.
    ///
    /// # Errors
    /// Those of ioctl(2).
    pub(crate) fn thaw(&self) -> Result<(), RootfsError> {
        self.if_whole("thaw", |root| sys::freeze_file_system(root, false))
    }

    fn if_whole(
        &self,
        action: &'static str,
        act: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> Result<(), RootfsError> {
        if self.kind != RootfsKind::Whole {
            return Ok(());
        }
        let acted = fs::File::open(&self.path).and_then(|root| act(root.as_fd()));
        acted.map_err(|source| RootfsError::Freeze { action, path: self.path.clone(), source })
    }

    /// Writes everything to the disk. Unmounting alone does not: the mounts of a container that has just
    /// ended disappear a little later than its processes, and the file system is only released with the last
    /// of them.
    ///
    /// # Errors
    /// Those of the disk.
    pub(crate) fn sync(&self) -> Result<(), RootfsError> {
        let rw = match self.kind {
            RootfsKind::Overlay => &self.disks[0],
            RootfsKind::Whole => &self.path,
            RootfsKind::ReadOnly => return Ok(()),
        };
        let failed = |source| RootfsError::Sync { path: rw.clone(), source };
        match fs::File::open(rw) {
            Ok(rw) => syncfs(rw).map_err(|err| failed(err.into())),
            // Unmounted and removed by an earlier call.
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(failed(err)),
        }
    }

    /// Unmounts the file systems and removes the mount points. May be called again.
    ///
    /// # Errors
    /// A file system is still in use.
    pub(crate) fn unmount(&self) -> Result<(), RootfsError> {
        for path in std::iter::once(&self.path).chain(&self.disks) {
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

/// Mounts an overlay with an index, so that file handles (name_to_handle_at(2)) stay the same when a file is
/// copied up. CRIU needs such handles to save watches on files (inotify(7)).
fn overlay(lower: &Path, rw: &Path, target: &Path) -> Result<(), Errno> {
    // Container ids, the only variable part, have no character with a meaning for overlayfs.
    let options = format!(
        "lowerdir={},upperdir={},workdir={},index=on,nfs_export=on",
        lower.display(),
        rw.join(UPPER).display(),
        rw.join(WORK).display()
    );
    mount(Some("overlay"), target, Some("overlay"), MsFlags::MS_NOATIME, Some(options.as_str()))
}

/// Makes the kernel build the index anew. The index is not part of the container's files.
fn forget_index(rw: &Path) -> io::Result<()> {
    match fs::remove_dir_all(rw.join(WORK).join("index")) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    origin::forget(&rw.join(UPPER))
}

fn mount_disk(
    role: &'static str,
    disk: &Disk,
    target: &Path,
    flags: MsFlags,
    options: &str,
) -> Result<(), RootfsError> {
    make_dir(target)?;
    let (source, result) = match disk {
        Disk::Block { device, .. } => {
            let mounted = |kind| {
                mount(Some(device), target, Some(kind), flags, (!options.is_empty()).then_some(options))
            };
            let mounted = match mounted("ext4") {
                // The kernel has found no ext4 on the disk. The VM's own image, which a sandbox has as its root file system,
                // is an EROFS.
                Err(Errno::EINVAL) if flags.contains(MsFlags::MS_RDONLY) && options.is_empty() => {
                    mounted("erofs")
                }
                result => result,
            };
            (device, mounted)
        }
        Disk::Directory(dir) => (dir, mount(Some(dir), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)),
    };
    result.map_err(|err| RootfsError::Mount { role, device: source.clone(), source: err })
}

/// Creates a directory; false when it exists.
fn make_dir(path: &Path) -> Result<bool, RootfsError> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(RootfsError::Create { path: path.to_owned(), source }),
    }
}

/// The root directory of an overlay has the owner and mode of the upper directory: a new one gets those of
/// the image.
fn copy_root_attributes(upper: &Path, image: &Path) -> io::Result<()> {
    let (of_image, of_upper) = (fs::metadata(image)?, fs::metadata(upper)?);
    if (of_image.uid(), of_image.gid()) != (of_upper.uid(), of_upper.gid()) {
        chown(upper, Some(of_image.uid()), Some(of_image.gid()))?;
    }
    if of_image.mode() != of_upper.mode() {
        fs::set_permissions(upper, of_image.permissions())?;
    }
    Ok(())
}
