//! The errors of containers' writable disks.

use std::path::PathBuf;

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};

use crate::{
    layer::LayerError,
    rootdisk::{RootdiskError, kind_of_io, mib},
};

/// Why the writable disk of a container could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum ContainerDiskError {
    /// The disk, or the directory with the changes, cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// No file system can be made.
    #[error(transparent)]
    Rootdisk(#[from] RootdiskError),
    /// What killed exports have left cannot be removed.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The changes of a container do not fit on a writable layer.
    #[error(
        "{} needs {}, more than the container's writable layer of {} has room for; raise rootdisk.writable_size_mib in \
         the configuration, or set the annotation io.machinen.rootdisk-size",
        path.display(), mib(*needed), mib(*size)
    )]
    UpperTooLarge {
        /// Path of the directory with the changes.
        path: PathBuf,
        /// What the changes take, bytes.
        needed: u64,
        /// The size of the writable layer, bytes.
        size: u64,
    },
    /// A file that should be a writable layer is not one.
    #[error("the writable layer {} {what}; remove it to start with an empty one", path.display())]
    NotWritable {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong, as the end of a sentence about the file.
        what: &'static str,
    },
}

impl HasKind for ContainerDiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(FileError { source, .. }) => kind_of_io(source),
            Self::Rootdisk(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::UpperTooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::NotWritable { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
