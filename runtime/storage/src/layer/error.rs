//! The errors of exporting and copying a container's changes.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
};

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("the guest's archive {what}")]
    Archive { what: &'static str },
    #[error("the guest's archive cannot be read")]
    Read(#[source] io::Error),
    #[error("{path:?} in the guest's archive {what}")]
    Entry { path: String, what: &'static str },
    #[error(
        "the guest's archive has more than {limit} entries; raise rootdisk.layer_max_entries in the configuration \
         if the container really has that many files"
    )]
    Entries { limit: u64 },
    #[error("the guest's archive needs more than the {} MiB that the container's writable layer has", limit >> 20)]
    Bytes { limit: u64 },
    #[error("cannot {action} {path:?} of the layer")]
    Write { action: &'static str, path: String, source: io::Error },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is a mount point and cannot be replaced", path.display())]
    MountPoint { path: PathBuf },
    #[error("cannot copy {}", path.display())]
    Copy { path: PathBuf, source: ProcessError },
    #[error("{} was replaced while it was copied: the container was paused, checkpointed or ended; try again", path.display())]
    Exchanged { path: PathBuf },
}

impl HasKind for LayerError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Archive { .. } | Self::Read(_) | Self::Entry { .. } => ErrorKind::FailedPrecondition,
            Self::Entries { .. } | Self::Bytes { .. } => ErrorKind::ResourceExhausted,
            Self::Write { source, .. } | Self::File(FileError { source, .. }) => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            },
            Self::Copy { .. } => ErrorKind::Internal,
            Self::Exchanged { .. } | Self::MountPoint { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
