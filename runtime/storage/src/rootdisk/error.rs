//! The errors of the cache of disks.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
    space::FreeSpace,
};

use super::ext4::Ext4Error;

/// Why a disk could not be found, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum RootdiskError {
    /// A file of the cache, or a mount of the source, cannot be made or used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file of the root file system cannot be read.
    #[error("cannot {action} {path} of the root file system {}", root.display())]
    Source {
        /// What failed: a verb that fits the text, such as `open`.
        action: &'static str,
        /// Path of the file inside the root file system.
        path: String,
        /// Path of the root file system on the host.
        root: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The overlay has no lower directory.
    #[error("the root file system has no layers")]
    NoLayers,
    /// A file is of a type that ext4 does not have.
    #[error("{path} in the root file system has an unknown type")]
    Kind {
        /// Path of the file inside the root file system.
        path: String,
    },
    /// A path is too long to be opened.
    #[error("the path {path} in the root file system is longer than {limit} bytes")]
    PathTooLong {
        /// The path inside the root file system.
        path: String,
        /// The limit of the kernel, bytes.
        limit: usize,
    },
    /// The source is not the same at the end of the conversion as at the start.
    #[error(
        "{path} in the root file system changed while it was being converted; stop what writes there and try again"
    )]
    Changed {
        /// Path of a file inside the root file system that changed.
        path: String,
    },
    /// The file system is full, or would be too full for the host.
    #[error(
        "not enough space in {} for a disk: {} needed, {} free, of which {} are kept free (rootdisk.disk_reserve_percent); \
         free some (`machinen rootdisk prune`) or set rootdisk.dir in the configuration to another file system",
        dir.display(), mib(*needed), mib(space.free), mib(space.kept)
    )]
    NoSpace {
        /// Path of the directory of the disk.
        dir: PathBuf,
        /// What the disk takes, bytes.
        needed: u64,
        /// The space of the file system.
        space: FreeSpace,
    },
    /// The disk would need block numbers of more than 32 bits.
    #[error("a root disk of {} is not possible; the largest is 16 TiB", mib(*size))]
    TooLarge {
        /// The size of the disk, bytes.
        size: u64,
    },
    /// mke2fs is not installed.
    #[error(
        "{program} not found; install the Debian package e2fsprogs, or set rootdisk.mke2fs in the configuration"
    )]
    NoMke2fs {
        /// The configured path or name.
        program: String,
    },
    /// mke2fs lacks something that machinen uses.
    #[error(
        "{program} is version {found}, but {least} or newer is needed; upgrade the package e2fsprogs, or set \
         rootdisk.mke2fs in the configuration"
    )]
    OldMke2fs {
        /// The configured path or name.
        program: String,
        /// The version that was found.
        found: String,
        /// The oldest version that can be used.
        least: String,
    },
    /// mke2fs failed.
    #[error("cannot make the disk in {}", dir.display())]
    Mke2fs {
        /// Path of the directory of the cache.
        dir: PathBuf,
        /// How mke2fs failed.
        source: ProcessError,
    },
    /// The disk that mke2fs made cannot be completed.
    #[error("cannot finish the disk of the root file system {}", root.display())]
    Finish {
        /// Path of the root file system on the host.
        root: PathBuf,
        /// What is wrong with the disk.
        source: Ext4Error,
    },
}

impl HasKind for RootdiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoLayers | Self::Kind { .. } | Self::PathTooLong { .. } | Self::TooLarge { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::Changed { .. } | Self::NoMke2fs { .. } | Self::OldMke2fs { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::NoSpace { .. } => ErrorKind::ResourceExhausted,
            Self::File(FileError { source, .. }) | Self::Source { source, .. } => kind_of_io(source),
            Self::Mke2fs { .. } | Self::Finish { .. } => ErrorKind::Internal,
        }
    }
}

/// What an error of the system means for a disk.
pub(crate) fn kind_of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
        _ => ErrorKind::Internal,
    }
}

/// Rounded up, so that a small amount is not shown as 0.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
