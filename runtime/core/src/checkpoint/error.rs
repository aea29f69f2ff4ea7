//! The errors of writing and using checkpoints.

use std::{ffi::OsString, io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};
use machinen_storage::rootdisk::RootdiskKey;

use super::manifest::{FORMAT, MANIFEST, MAX_SIZE};

/// Why a checkpoint cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// An operation on a file failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The disk is full, or the quota is used up.
    #[error("not enough space for the checkpoint in {}", path.display())]
    NoSpace {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another mount of the container is at the same place as a volume.
    #[error(
        "the volume {destination} covers another mount or is covered by one, and a restore could make only one of them"
    )]
    CoveredVolume {
        /// Where the volume is mounted in the container.
        destination: String,
    },
    /// The new container lacks a volume.
    #[error(
        "the checkpoint has the volume {destination}, for which the configuration has none: add a bind mount with this \
         destination"
    )]
    NoVolume {
        /// The path in the checkpoint's configuration.
        destination: String,
    },
    /// The new container has a volume that the checkpoint lacks.
    #[error(
        "the configuration has the volume {}, which the checkpoint does not have: remove the mount, since a restored \
         container has the mounts of its checkpoint",
        destination.display()
    )]
    NewVolume {
        /// The path in the new configuration.
        destination: PathBuf,
    },
    /// A directory takes the place of a file, or a file that of a directory.
    #[error(
        "{}, the source of the volume {destination}, is a {}, and it was a {} when the checkpoint was taken",
        path.display(), kind(*is_file), kind(!*is_file)
    )]
    VolumeKind {
        /// The path in the container.
        destination: String,
        /// The path on the host.
        path: PathBuf,
        /// Whether the source is a file now.
        is_file: bool,
    },
    /// The checkpoint's mount is read-only, and stays so.
    #[error(
        "the checkpoint has the volume {destination} read-only, and the configuration writable: add the option ro to the \
         mount"
    )]
    ReadOnlyVolume {
        /// The path in the container.
        destination: String,
    },
    /// The new container lacks a copy mount.
    #[error(
        "the checkpoint has a copy mount at {destination}, for which the configuration has none: add it to the annotation \
         io.machinen.copy-mount"
    )]
    NoCopy {
        /// The path in the checkpoint's configuration.
        destination: String,
    },
    /// The new container has a copy mount that the checkpoint lacks.
    #[error(
        "the configuration has a copy mount at {}, which the checkpoint does not have: remove it from the annotation \
         io.machinen.copy-mount",
        destination.display()
    )]
    NewCopy {
        /// The path in the new configuration.
        destination: PathBuf,
    },
    /// The copied files are not those of the checkpoint.
    #[error(
        "the copy mount at {destination} was made of the files {theirs}, which are not in the cache any more, and the \
         directory has other files now, {ours}"
    )]
    CopyBase {
        /// The path in the container.
        destination: String,
        /// The base disk of the checkpoint.
        theirs: String,
        /// The base disk of the directory.
        ours: RootdiskKey,
    },
    /// The directory for a new checkpoint has files in it.
    #[error(
        "{} is not empty: it has {other:?}, and a checkpoint needs a directory of its own, or takes the place of an earlier \
         one",
        path.display()
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// The name of one of the files.
        other: OsString,
    },
    /// The directory belongs to neither root nor the caller.
    #[error("{} belongs to user {owner}, who could exchange its files: use a directory of root's or of your own", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// The directory's owner.
        owner: u32,
    },
    /// The guest's report does not describe images on the disk.
    #[error("the guest's report about its images is not valid: {what}")]
    Guest {
        /// What is wrong with the report.
        what: String,
    },
    /// The directory has no manifest.
    #[error("{} is not a checkpoint of machinen: it has no {MANIFEST}", dir.display())]
    NoManifest {
        /// The directory of the checkpoint.
        dir: PathBuf,
    },
    /// The manifest is not the JSON that is expected.
    #[error("{} is not valid", path.display())]
    Manifest {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The manifest would be larger than one that is read.
    #[error("the checkpoint has too many files: {} would have more than {} MiB", path.display(), MAX_SIZE >> 20)]
    LargeManifest {
        /// The manifest.
        path: PathBuf,
    },
    /// The checkpoint has another format.
    #[error("{} has format {found}, this version of machinen reads format {FORMAT}", path.display())]
    Format {
        /// The file or directory.
        path: PathBuf,
        /// What the checkpoint has.
        found: u32,
    },
    /// The checkpoint was taken on another architecture.
    #[error("the checkpoint was taken on {found}, this host is {here}")]
    Arch {
        /// What the checkpoint has.
        found: String,
        /// What this host has.
        here: &'static str,
    },
    /// The manifest names a file that no checkpoint has.
    #[error("{} names {name:?}, which is no file of a checkpoint", path.display())]
    Name {
        /// The file or directory.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The number of digests does not match the size of an image.
    #[error("{} does not have the digests of all parts of {name}, or has too many", path.display())]
    Parts {
        /// The file or directory.
        path: PathBuf,
        /// The name of the image.
        name: String,
    },
    /// The images do not fit on one disk.
    #[error("the files of the checkpoint {} are more than 16 TiB", dir.display())]
    TooLarge {
        /// The directory of the checkpoint.
        dir: PathBuf,
    },
    /// An image is not what the manifest describes.
    #[error("{} of the checkpoint {what}: it was truncated or changed", path.display())]
    Changed {
        /// The file or directory.
        path: PathBuf,
        /// What differs, as the end of a sentence.
        what: String,
    },
    /// The checkpoint is not the one that the container's annotation names.
    #[error(
        "the checkpoint has the digest {found}, but the annotation io.machinen.checkpoint-digest has {pinned}"
    )]
    Digest {
        /// The digest of the manifest.
        found: String,
        /// The digest that was asked for.
        pinned: String,
    },
    /// The checkpoint would be restored in a VM with other containers, and its origin is not known.
    #[error(
        "a checkpoint decides which processes it becomes, with which rights, and this VM has other containers: if \
         you trust it, put its digest, as `machinen snapshot inspect` prints it, into the annotation \
         io.machinen.checkpoint-digest"
    )]
    Unpinned,
    /// One of the guest kernels, or both, were supplied by the user, and they are not the same.
    #[error(
        "the checkpoint was taken with {}, and the VM has {}: restore it with the same vm.accel and vm.pvm_kernel",
        named(theirs),
        named(ours)
    )]
    KernelDigest {
        /// The digest of the kernel of the checkpoint; None for machinen's own.
        theirs: Option<String>,
        /// That of this VM's.
        ours: Option<String>,
    },
    /// The checkpoint belongs to another root file system.
    #[error(
        "the checkpoint was taken on the root file system {theirs}, but the container has {ours}: restore it with the same image"
    )]
    Rootfs {
        /// The root file system of the checkpoint.
        theirs: String,
        /// The root file system of the container.
        ours: RootdiskKey,
    },
}

/// A guest kernel in an error.
fn named(digest: &Option<String>) -> String {
    digest
        .as_ref()
        .map_or("machinen's own guest kernel".to_owned(), |digest| format!("the guest kernel {digest}"))
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

fn kind(is_file: bool) -> &'static str {
    if is_file { "file" } else { "directory" }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl HasKind for CheckpointError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(_) | Self::Guest { .. } => ErrorKind::Internal,
            Self::NoSpace { .. } | Self::LargeManifest { .. } => ErrorKind::ResourceExhausted,
            Self::NotEmpty { .. } => ErrorKind::AlreadyExists,
            Self::Owner { .. } => ErrorKind::PermissionDenied,
            Self::NoManifest { .. } => ErrorKind::NotFound,
            Self::Manifest { .. }
            | Self::Name { .. }
            | Self::Parts { .. }
            | Self::TooLarge { .. }
            | Self::Changed { .. } => ErrorKind::InvalidArgument,
            Self::CoveredVolume { .. }
            | Self::NoVolume { .. }
            | Self::NewVolume { .. }
            | Self::NoCopy { .. }
            | Self::NewCopy { .. }
            | Self::CopyBase { .. }
            | Self::VolumeKind { .. }
            | Self::ReadOnlyVolume { .. }
            | Self::Format { .. }
            | Self::Arch { .. }
            | Self::Digest { .. }
            | Self::Unpinned
            | Self::KernelDigest { .. }
            | Self::Rootfs { .. } => ErrorKind::FailedPrecondition,
        }
    }
}
