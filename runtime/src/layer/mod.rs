//! The writable layer on its way out of the VM: what a container has changed becomes part of its snapshot on the host.
//!
//! ```text
//!   guest agent ──archive──> receive ──> apply ──> fresh directory beside the layer ──exchange──> in its place
//! ```
//! The archive (see `machinen_protocol::layer`) comes from the guest and is hostile until it has proved otherwise. Every
//! file is made in a directory that this module has made itself a moment before, never through a symbolic link and never
//! over something that exists; what our agent would not send is refused, not mended. Names, attributes, the number of
//! entries and the bytes on the disk are bounded; memory does not grow with the archive.
//!
//! Device nodes: a removed file is one (0:0) and is kept; those that every container has (null, zero, full, random,
//! urandom, tty, console, ptmx, fuse, net/tun) are too. For any other the log gets a line, and the layer a removed file where
//! something of a lower layer could show instead: a node that opens the host's disks has no place on the host, wherever it is.
//!
//! The layer is exchanged with one rename(2): whoever dies, and when, leaves the old one or the new one. The container's
//! disk is kept until the new one has reached the medium; a disk that exists has writes that the snapshot may lack.

mod apply;
mod archive;
mod copy;
mod error;
mod lower;
mod receive;
mod staging;

use std::path::PathBuf;

pub use apply::{Applied, apply};
pub use copy::{LayerCopy, identity};
pub use error::LayerError;
pub use receive::receive;
pub use staging::{PreviousLayer, StagingDir, sweep};

/// What an archive may ask of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLimits {
    /// Entries of the archive.
    pub entries: u64,
    /// Bytes on the disk, in whole blocks.
    pub bytes: u64,
}

/// Which directory of the host holds a container's changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerTarget {
    /// The upper directory of an overlay: gets the changes with overlayfs's marks.
    Upper(PathBuf),
    /// The whole root file system, as the native snapshotter keeps it: gets what the container had.
    Whole(PathBuf),
}

impl LayerTarget {
    pub fn path(&self) -> &std::path::Path {
        match self {
            Self::Upper(path) | Self::Whole(path) => path,
        }
    }
}

#[cfg(test)]
mod tests;
