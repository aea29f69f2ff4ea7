//! The errors of writing and using checkpoints.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};
use machinen_storage::rootdisk::RootdiskKey;

use super::manifest::{FORMAT, MANIFEST};

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("not enough space for the checkpoint in {}", path.display())]
    NoSpace { path: PathBuf, source: io::Error },
    #[error("{} is not empty: a checkpoint needs a directory of its own", path.display())]
    NotEmpty { path: PathBuf },
    #[error("the guest's report about its images is not valid: {what}")]
    Guest { what: String },
    #[error("{} is not a checkpoint of machinen: it has no {MANIFEST}", dir.display())]
    NoManifest { dir: PathBuf },
    #[error("{} is not valid", path.display())]
    Manifest { path: PathBuf, source: serde_json::Error },
    #[error("{} has format {found}, this version of machinen reads format {FORMAT}", path.display())]
    Format { path: PathBuf, found: u32 },
    #[error("the checkpoint was taken on {found}, this host is {here}")]
    Arch { found: String, here: &'static str },
    #[error("{} is named {name:?}, which is not a plain file name", path.display())]
    Name { path: PathBuf, name: String },
    #[error("{} does not have the digests of all parts of {name}, or has too many", path.display())]
    Parts { path: PathBuf, name: String },
    #[error("the files of the checkpoint {} are more than 16 TiB", dir.display())]
    TooLarge { dir: PathBuf },
    #[error("{} of the checkpoint {what}: it was truncated or changed", path.display())]
    Changed { path: PathBuf, what: String },
    #[error(
        "the checkpoint was taken on the root file system {theirs}, but the container has {ours}: restore it with the same image"
    )]
    Rootfs { theirs: String, ours: RootdiskKey },
}

impl CheckpointError {
    /// As [`FileError::at`], with an error of its own for a full disk.
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let failed = FileError::at(action, path);
        move |source| match failed(source) {
            FileError { path, source, .. } if is_full(&source) => Self::NoSpace { path, source },
            failed => Self::File(failed),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl HasKind for CheckpointError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(_) | Self::Guest { .. } => ErrorKind::Internal,
            Self::NoSpace { .. } => ErrorKind::ResourceExhausted,
            Self::NotEmpty { .. } => ErrorKind::AlreadyExists,
            Self::NoManifest { .. } => ErrorKind::NotFound,
            Self::Manifest { .. }
            | Self::Name { .. }
            | Self::Parts { .. }
            | Self::TooLarge { .. }
            | Self::Changed { .. } => ErrorKind::InvalidArgument,
            Self::Format { .. } | Self::Arch { .. } | Self::Rootfs { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
