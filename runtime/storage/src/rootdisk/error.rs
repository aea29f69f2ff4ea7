//! The errors of the cache of disks.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
};

use super::ext4::Ext4Error;

/// Why a disk could not be found, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum RootdiskError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot {action} {path} of the root file system {}", root.display())]
    Source { action: &'static str, path: String, root: PathBuf, source: io::Error },
    #[error("the root file system has no layers")]
    NoLayers,
    #[error("{path} in the root file system has an unknown type")]
    Kind { path: String },
    #[error("the path {path} in the root file system is longer than {limit} bytes")]
    PathTooLong { path: String, limit: usize },
    #[error(
        "{path} in the root file system changed while it was being converted; stop what writes there and try again"
    )]
    Changed { path: String },
    #[error(
        "not enough space in {} for a root disk: {} needed, {} free; free some (`machinen rootdisk prune`) or set \
         rootdisk.dir in the configuration to another file system",
        dir.display(), mib(*needed), mib(*free)
    )]
    NoSpace { dir: PathBuf, needed: u64, free: u64 },
    #[error("a root disk of {} is not possible; the largest is 16 TiB", mib(*size))]
    TooLarge { size: u64 },
    #[error(
        "{program} not found; install the Debian package e2fsprogs, or set rootdisk.mke2fs in the configuration"
    )]
    NoMke2fs { program: String },
    #[error(
        "{program} is version {found}, but {least} or newer is needed; upgrade the package e2fsprogs, or set \
         rootdisk.mke2fs in the configuration"
    )]
    OldMke2fs { program: String, found: String, least: String },
    #[error("cannot make the disk in {}", dir.display())]
    Mke2fs { dir: PathBuf, source: ProcessError },
    #[error("cannot finish the disk of the root file system {}", root.display())]
    Finish { root: PathBuf, source: Ext4Error },
    #[error(
        "{} needs {}, more than the container's writable layer of {} has room for; raise rootdisk.writable_size_mib in \
         the configuration, or set the annotation io.machinen.rootdisk-size",
        path.display(), mib(*needed), mib(*size)
    )]
    UpperTooLarge { path: PathBuf, needed: u64, size: u64 },
    #[error("cannot make the writable layer {}", path.display())]
    Writable { path: PathBuf, source: io::Error },
    #[error("the writable layer {} {what}; remove it to start with an empty one", path.display())]
    NotWritable { path: PathBuf, what: String },
}

impl HasKind for RootdiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoLayers | Self::Kind { .. } | Self::PathTooLong { .. } | Self::TooLarge { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::Changed { .. }
            | Self::NoMke2fs { .. }
            | Self::OldMke2fs { .. }
            | Self::NotWritable { .. } => ErrorKind::FailedPrecondition,
            Self::NoSpace { .. } | Self::UpperTooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::File(FileError { source, .. })
            | Self::Source { source, .. }
            | Self::Writable { source, .. } => of_io(source),
            Self::Mke2fs { .. } | Self::Finish { .. } => ErrorKind::Internal,
        }
    }
}

fn of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
        _ => ErrorKind::Internal,
    }
}

/// Rounded up, so that a small amount is not shown as 0.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}
