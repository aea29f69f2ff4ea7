//! The cache of ext4 disks made from image root file systems.
//!
//! A disk is named by a digest of the tree that it holds (its *key*), and its bytes are a function of that
//! tree alone. The *identity* of a source is cheap to compute and leads to the key, so that a start from a
//! known image only has to open a file:
//!
//! ```text
//! source ── identity ──> index ──> KEY.ext4                        known: nothing is read
//!    └─ lock identity ─> walk ─ lock shape ─┬─ shape known ─> hash ──> KEY.ext4 of an equal tree
//!                                           └─ hash  ┐
//!                                              mke2fs┴> normalise ─> publish
//! ```
//! The shape is a digest of the walk. If no disk has the shape of a tree, the tree is in no disk, so hashing
//! and mke2fs can run in parallel.

mod build;
mod error;
pub(crate) mod ext4;
mod file_digest;
mod flat;
mod hashing;
mod init_layer;
mod key;
pub(crate) mod lock;
mod manage;
mod manifest;
pub(crate) mod mkfs;
mod mkfs_jail;
mod source;
pub(crate) mod source_mount;
pub(crate) mod store;
pub(crate) mod tree;

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::{
    fs::FileError,
    space::{DiskReserve, FreeSpace},
};
use store::Store;

pub use error::RootdiskError;
pub(crate) use error::{kind_of_io, mib};
pub use ext4::Ext4Error;
pub use key::{RootdiskKey, RootdiskKeyError};
pub use manage::{DiskState, ListedDisk, PruneOptions, PrunedDisks};
pub use mkfs::{MKE2FS_VARIABLE, mke2fs_version};
pub use source::RootfsSource;
pub use store::{DiskMetadata, UnusableDisk};

/// Largest file system with 32-bit block numbers.
pub(crate) const LARGEST: u64 = 16 << 40;

/// The cache, shared by all processes that open the same directory.
#[derive(Debug, Clone)]
pub struct RootdiskCache {
    pub(crate) store: Store,
    index: Store,
    pub(crate) locks: Store,
    /// Empty file systems for containers' writable disks.
    pub(crate) blanks: Store,
}

/// How a disk is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// Least bytes of the disk; a larger tree gets 2.5 times its size.
    pub min_size: u64,
    /// A path, or a name in PATH; [`MKE2FS_VARIABLE`] overrides it.
    pub mke2fs: PathBuf,
    /// What the disk leaves free of the file system of the cache.
    pub reserve: DiskReserve,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { min_size: 2 << 30, mke2fs: "mke2fs".into(), reserve: DiskReserve::default() }
    }
}

/// The progress of a build, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootdiskProgress {
    /// Another caller builds the same disk. The next event comes when it has finished.
    Waiting,
    /// The tree was walked; conversion begins.
    Converting {
        /// The number of files of the tree.
        files: u64,
        /// The content of the regular files, bytes.
        bytes: u64,
    },
    /// Bytes of content that were hashed so far.
    Hashed {
        /// Bytes that have been read.
        done: u64,
        /// Bytes of all content.
        total: u64,
    },
    /// The content has been copied; the disk is being finished.
    Finishing,
}

impl fmt::Display for RootdiskProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("waiting for another build of the same disk"),
            Self::Converting { files, bytes } => write!(f, "converting {files} files, {} MiB", bytes >> 20),
            Self::Hashed { done, total } => write!(f, "read {} of {} MiB", done >> 20, total >> 20),
            Self::Finishing => f.write_str("finishing"),
        }
    }
}

/// A disk, which is in use as long as this value exists.
#[derive(Debug)]
pub struct Rootdisk {
    /// The name of the disk: a digest of its content.
    pub key: RootdiskKey,
    /// Path of the disk in the cache.
    pub path: PathBuf,
    /// Open for reading only, with a shared lock. The disk is in use, and not removed, while this open file
    /// description exists in any process.
    pub file: File,
    /// Bytes.
    pub size: u64,
    /// The disk was found in the cache.
    pub cached: bool,
    /// The duration of each phase; hashing and mke2fs overlap.
    pub phases: Vec<(&'static str, Duration)>,
}

impl RootdiskCache {
    /// Opens the cache. Its directory is made (mode 0700) if it is missing.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(dir: &Path) -> Result<Self, RootdiskError> {
        let store = Store::open(dir)?;
        Ok(Self {
            index: store.subdir("index")?,
            locks: store.subdir("locks")?,
            blanks: store.subdir("writable")?,
            store,
        })
    }

    /// Path of the directory of the cache.
    pub fn dir(&self) -> &Path {
        &self.store.dir
    }
}

/// Checks that a file in `dir` can take `needed` bytes more.
pub(crate) fn check_space(
    reserve: DiskReserve,
    file: &File,
    dir: &Path,
    needed: u64,
) -> Result<(), RootdiskError> {
    let space = space_of(reserve, file, dir)?;
    match space.usable() < needed {
        true => Err(RootdiskError::NoSpace { dir: dir.to_owned(), needed, space }),
        false => Ok(()),
    }
}

/// The space of the file system of a file in `dir`.
fn space_of(reserve: DiskReserve, file: &File, dir: &Path) -> Result<FreeSpace, RootdiskError> {
    Ok(reserve.space(file).map_err(FileError::at("look for free space in", dir))?)
}

#[cfg(test)]
pub(crate) mod tests;
