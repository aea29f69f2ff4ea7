//! Copies what a container has written for another container, on the host, from snapshot to snapshot.
//!
//! ```text
//!   directory   only exports replace it: copied to a staging directory; it must not be replaced meanwhile
//!   disk        the container writes to it: copied while the container is paused
//! ```
//! cp(1) makes the copy, since it shares blocks where the file system can (reflink), and keeps holes where it
//! cannot. It reads files that the host has made from the guest's archive, or the bytes of a disk. No file
//! system that a guest has written is mounted.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use machinen_base::{fs::FileError, process};

use super::{LayerError, LayerTarget, StagingDir};

const CP: [&str; 6] =
    ["--no-dereference", "--recursive", "--no-target-directory", "--reflink=auto", "--sparse=auto", "--"];
const ALL_ATTRIBUTES: &str = "--preserve=mode,ownership,timestamps,links,xattr";

/// Identifies the directory of a layer among all directories that have had its path.
///
/// # Errors
/// The directory does not exist.
pub fn identity(dir: &Path) -> Result<String, LayerError> {
    let metadata = fs::metadata(dir).map_err(FileError::at("look at", dir))?;
    // Inode numbers are reused, so the time of the last change is included. It does not change after an
    // exchange.
    Ok(format!("{}-{}.{:09}", metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// A copy of what one container has written to the snapshot of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerCopy {
    /// Both snapshots keep the changes as a directory.
    Directories {
        /// The directory that is copied.
        from: LayerTarget,
        /// The directory that is replaced by the copy.
        to: LayerTarget,
    },
    /// Both snapshots have a writable disk as a file.
    Disks {
        /// Path of the disk that is copied.
        from: PathBuf,
        /// Path of the new disk.
        to: PathBuf,
    },
}

impl LayerCopy {
    /// Whether the container must not write while the copy is made.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Disks { .. })
    }

    /// Makes the copy. `identity` is the identity of the source that its checkpoint has recorded. Blocks.
    ///
    /// # Errors
    /// The source has another identity by now, there is no space, or cp is missing.
    pub fn copy(&self, identity: Option<&str>) -> Result<(), LayerError> {
        match self {
            Self::Directories { from, to } => copy_directory(from.path(), to.path(), identity),
            Self::Disks { from, to } => run_cp(&[], from, to),
        }
    }
}

fn copy_directory(from: &Path, to: &Path, expected: Option<&str>) -> Result<(), LayerError> {
    let unchanged = || match (expected, identity(from)?) {
        (Some(expected), now) if now == expected => Ok(()),
        _ => Err(LayerError::Exchanged { path: from.to_owned() }),
    };
    unchanged()?;
    let staging = StagingDir::next_to(to)?;
    run_cp(&[ALL_ATTRIBUTES], from, &staging.fresh_path())?;
    unchanged()?;
    staging.exchange().map(drop)
}

fn run_cp(more: &[&str], from: &Path, to: &Path) -> Result<(), LayerError> {
    let args = more.iter().chain(&CP).map(AsRef::as_ref).chain([from.as_os_str(), to.as_os_str()]);
    let ran = process::run("cp", args, &[]);
    ran.map(drop).map_err(|source| LayerError::Copy { path: from.to_owned(), source })
}
