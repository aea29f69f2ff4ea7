//! The cache of ext4 disks made from image root file systems.
//!
//! A disk is named by a digest of the tree that it holds (its *key*), and its bytes are a function of that tree alone.
//! How a source was recognised (its *identity*) costs next to nothing to compute and leads to the key, so that a start
//! from a known image opens a file and that is all:
//!
//! ```text
//! source ── identity ──> index ──> KEY.ext4                          known: nothing is read
//!    └─ lock identity ─> walk ─ lock shape ─┬─ shape known ─> hash ──> KEY.ext4 of another root of the same image
//!                                           └─ hash  ┐
//!                                              mke2fs┴> normalise ─> publish
//! ```
//! The shape is a digest of the walk: a tree whose shape nobody has seen is in no disk, so that hashing and mke2fs can
//! run side by side.

mod build;
mod error;
mod ext4;
mod file_digest;
mod hashing;
mod key;
mod lock;
mod manage;
mod manifest;
mod mkfs;
mod source;
mod source_mount;
mod store;
mod tree;
mod writable;

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

pub use error::RootdiskError;
pub use ext4::Ext4Error;
pub use key::{RootdiskKey, RootdiskKeyError};
pub use manage::{DiskState, ListedDisk, Prune, Pruned};
pub use mkfs::{MKE2FS_VARIABLE, mke2fs_version};
pub use source::RootfsSource;
use store::Store;
pub use store::{DiskMetadata, Unusable};
pub use writable::open_writable;

/// Where the cache is unless the configuration says otherwise.
pub const DEFAULT_DIR: &str = "/var/lib/machinen/rootdisk";
/// Largest file system with 32-bit block numbers.
const LARGEST: u64 = 16 << 40;

/// The cache, shared by all processes that open the same directory.
#[derive(Debug, Clone)]
pub struct RootdiskCache {
    store: Store,
    index: Store,
    locks: Store,
    templates: Store,
}

/// How a disk is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildOptions {
    /// Least bytes of the disk; a larger tree gets 2.5 times its size.
    pub min_size: u64,
    /// A path, or a name in PATH; [`MKE2FS_VARIABLE`] overrides it.
    pub mke2fs: PathBuf,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { min_size: 2 << 30, mke2fs: "mke2fs".into() }
    }
}

/// What happens during a build, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootdiskProgress {
    /// Somebody else builds the same disk; the next event comes when that is done.
    Waiting,
    /// The tree was walked; conversion begins.
    Converting { files: u64, bytes: u64 },
    /// Bytes of content that were hashed so far.
    Hashed { done: u64, total: u64 },
    /// The content is in; the disk is being finished.
    Finishing,
}

impl fmt::Display for RootdiskProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("waiting for whoever builds the same disk"),
            Self::Converting { files, bytes } => write!(f, "converting {files} files, {} MiB", bytes >> 20),
            Self::Hashed { done, total } => write!(f, "read {} of {} MiB", done >> 20, total >> 20),
            Self::Finishing => f.write_str("finishing"),
        }
    }
}

/// A disk that is in use as long as this lives.
#[derive(Debug)]
pub struct Rootdisk {
    pub key: RootdiskKey,
    pub path: PathBuf,
    /// Open for reading only, and holding a shared lock: while this description is open anywhere, in another process
    /// too, the disk is in use and stays.
    pub file: File,
    /// Bytes.
    pub size: u64,
    /// Nothing was converted.
    pub cached: bool,
    /// What took how long; hashing and mke2fs overlap.
    pub phases: Vec<(&'static str, Duration)>,
}

impl RootdiskCache {
    /// Opens the cache, and makes its directory (mode 0700) if there is none.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(dir: &Path) -> Result<Self, RootdiskError> {
        let store = Store::open(dir)?;
        Ok(Self {
            index: store.subdir("index")?,
            locks: store.subdir("locks")?,
            templates: store.subdir("writable")?,
            store,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.store.dir
    }
}

#[cfg(test)]
mod tests;
