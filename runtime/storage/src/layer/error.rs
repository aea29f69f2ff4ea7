//! The errors of exporting and copying a container's changes.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
    space::FreeSpace,
};

/// Why the changes of a container could not be stored or copied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive as a whole is not one that an agent sends.
    #[error("the guest's archive {what}")]
    Archive {
        /// What is wrong, as the end of a sentence about the archive.
        what: &'static str,
    },
    /// The stream from the guest failed, or is not a tar archive.
    #[error("the guest's archive cannot be read")]
    Read(#[source] io::Error),
    /// One entry is not one that an agent sends.
    #[error("{path:?} in the guest's archive {what}")]
    Entry {
        /// Path of the entry, as the archive has it.
        path: String,
        /// What is wrong, as the end of a sentence about the entry.
        what: &'static str,
    },
    /// The archive has too many entries.
    #[error(
        "the guest's archive has more than {limit} entries; raise rootdisk.layer_max_entries in the configuration \
         if the container really has that many files"
    )]
    Entries {
        /// The limit of the configuration (`rootdisk.layer_max_entries`).
        limit: u64,
    },
    /// The archive is larger than what the container can have written.
    #[error("the guest's archive needs more than the {} MiB that the container's writable layer has", limit >> 20)]
    Bytes {
        /// The size of the writable layer, bytes.
        limit: u64,
    },
    /// The file system of the layer would be too full for the host.
    #[error(
        "the file system of the layer has {} MiB free, of which {} MiB are kept free (rootdisk.disk_reserve_percent)",
        space.free >> 20, space.kept >> 20
    )]
    NoSpace {
        /// The space of the file system.
        space: FreeSpace,
    },
    /// The host cannot make a file of the layer.
    #[error("cannot {action} {path:?} of the layer")]
    Write {
        /// What failed: a verb that fits the text, such as `create`.
        action: &'static str,
        /// Path inside the layer.
        path: String,
        /// What the system answered.
        source: io::Error,
    },
    /// The directory of the layer, or one next to it, cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The layer is a mount point, which cannot be exchanged.
    #[error("{} is a mount point and cannot be replaced", path.display())]
    MountPoint {
        /// Path of the layer.
        path: PathBuf,
    },
    /// cp(1) did not copy the layer.
    #[error("cannot copy {}", path.display())]
    Copy {
        /// Path of the layer that was copied.
        path: PathBuf,
        /// How cp(1) failed.
        source: ProcessError,
    },
    /// The layer is not the one that the checkpoint has recorded.
    #[error("{} was replaced while it was copied: the container was paused, checkpointed or ended; try again", path.display())]
    Exchanged {
        /// Path of the layer.
        path: PathBuf,
    },
}

impl HasKind for LayerError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Archive { .. } | Self::Read(_) | Self::Entry { .. } => ErrorKind::FailedPrecondition,
            Self::Entries { .. } | Self::Bytes { .. } | Self::NoSpace { .. } => ErrorKind::ResourceExhausted,
            Self::Write { source, .. } | Self::File(FileError { source, .. }) => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            },
            Self::Copy { .. } => ErrorKind::Internal,
            Self::Exchanged { .. } | Self::MountPoint { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
