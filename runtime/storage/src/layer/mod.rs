//! Takes the writable layer out of the VM: what a container has changed becomes part of its snapshot on the
//! host.
//!
//! ```text
//!   guest agent ──archive──> pod::receive ──> apply ──> staging directory ──exchange──> layer
//! ```
//! The archive (see `machinen_protocol::layer`) comes from the guest and is not trusted. Every file is made
//! in a directory that this module has just made itself, never through a symbolic link and never over an
//! existing file. Whatever our agent would not send is refused, not repaired. Names, attributes, the number
//! of entries and the bytes on the disk are bounded; memory does not grow with the archive.
//!
//! Device nodes: the mark of a removed file is one (0:0) and is kept, and so are those that every container
//! has (null, zero, full, random, urandom, tty, console, ptmx, fuse, net/tun). Any other is logged and left
//! out, and replaced by a mark where a file of a lower layer would become visible instead. A node that opens
//! the host's disks must not exist anywhere on the host.
//!
//! The layer is exchanged with one rename(2), so that a crash at any time leaves either the old or the new
//! one. A directory of the user's own is not exchanged: the changes are merged into it ([`merge`]).
//! Of a directory on which an overlay is mounted the content is exchanged, one name after the other, since the overlay
//! would keep the old directory. The container's disk is kept until the new layer is on stable storage: while a disk exists, it may
//! have writes that the snapshot lacks.

mod apply;
mod archive;
mod copy;
mod error;
mod exported;
mod lower;
mod merge;
mod mounted;
mod staging;

use std::{
    io::Read,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use machinen_base::{confined::confined, space::DiskReserve};

pub use apply::{AppliedLayer, apply};
pub use copy::{LayerCopy, identity};
pub use error::LayerError;
use exported::RecordedExport;
pub use staging::{PreviousLayer, StagingDir, sweep, sweep_within};

/// Limits of what an archive may make on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLimits {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes on the disk, in whole blocks.
    pub bytes: u64,
    /// What they leave free of the file system of the layer.
    pub reserve: DiskReserve,
}

/// The directory of the host that gets a container's changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerTarget {
    /// The upper directory of an overlay: gets the changes with overlayfs's marks.
    Upper(PathBuf),
    /// The upper directory of an overlay that is mounted, as dockerd and Podman mount one: stays in place and gets the
    /// changes with overlayfs's marks, so that the files of the mount are the container's.
    MountedUpper {
        /// The directory.
        upper: PathBuf,
        /// Where the overlay is mounted.
        mount: PathBuf,
    },
    /// The whole root file system, as the native snapshotter keeps it: gets what the container had.
    Whole(PathBuf),
    /// A directory that belongs to no snapshotter, and that others may use: stays in place, and gets the changes.
    InPlace(PathBuf),
}

impl LayerTarget {
    /// Path of the directory of the layer.
    pub fn path(&self) -> &Path {
        match self {
            Self::Upper(path)
            | Self::MountedUpper { upper: path, .. }
            | Self::Whole(path)
            | Self::InPlace(path) => path,
        }
    }
}

/// What earlier exports of the same container have changed in its layer.
#[derive(Debug)]
pub struct EarlierExports<'a> {
    /// The layer before the first of them, as [`PreviousLayer::files`] opens it; None: there were none. Without it a
    /// whole root file system would keep what the container has removed since.
    pub before: Option<OwnedFd>,
    /// The file with the names that they have merged into a directory. It may be missing.
    pub record: &'a Path,
}

/// Writes an archive into a fresh directory, and exchanges it with `target` or merges it into `target`.
///
/// # Errors
/// The agent would not send this archive, it exceeds `limits`, or the host cannot store it. Then the old layer is still
/// in place, and nothing of the new one is left. Only a merge, or the exchange of the content of a mounted directory, that
/// the host's file system does not permit leaves a part of the changes.
pub fn store(
    archive: impl Read + Send,
    target: &LayerTarget,
    earlier: EarlierExports<'_>,
    limits: LayerLimits,
) -> Result<(AppliedLayer, PreviousLayer), LayerError> {
    match target {
        LayerTarget::Upper(path) => {
            let staging = StagingDir::next_to(path)?;
            let applied = apply_confined(archive, staging.fresh(), None, limits)?;
            Ok((applied, staging.exchange()?))
        }
        LayerTarget::MountedUpper { upper, mount } => {
            let staging = StagingDir::next_to(upper)?;
            let applied = apply_confined(archive, staging.fresh(), None, limits)?;
            let replaced = staging.exchange_content()?;
            mounted::forget_names(mount);
            Ok((applied, replaced))
        }
        LayerTarget::Whole(path) => {
            let staging = StagingDir::next_to(path)?;
            let lower = earlier.before.map_or_else(|| staging.current(), Ok)?;
            let applied = apply_confined(archive, staging.fresh(), Some(lower.as_fd()), limits)?;
            Ok((applied, staging.exchange()?))
        }
        LayerTarget::InPlace(path) => {
            let staging = StagingDir::on_file_system_of(path)?;
            let applied = apply_confined(archive, staging.fresh(), None, limits)?;
            let recorded = RecordedExport::begin(earlier.record, staging.fresh())?;
            merge::merge(staging.fresh(), path)?;
            recorded.complete()?;
            Ok((applied, staging.merged()))
        }
    }
}

/// Like [`apply`], in a thread that can reach only the two directories.
pub(crate) fn apply_confined(
    archive: impl Read + Send,
    root: BorrowedFd<'_>,
    lower: Option<BorrowedFd<'_>>,
    limits: LayerLimits,
) -> Result<AppliedLayer, LayerError> {
    let dirs: Vec<_> = [Some(root), lower].into_iter().flatten().collect();
    confined(&dirs, || apply(archive, root, lower, limits))
        .map_err(|source| apply::write_error("confine the unpacking of", &[], source))?
}

#[cfg(test)]
mod tests;
