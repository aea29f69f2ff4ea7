//! What a container has written, once more for another container: copied on the host, from snapshot to snapshot.
//!
//! ```text
//!   directory   only an export exchanges it: copied beside the new snapshot's, exchanged; it must have been the same all along
//!   disk        the container writes to it: copied while that is paused
//! ```
//! cp(1) does it, since it shares blocks where the file system can (reflink), and keeps holes where it cannot. It reads what
//! the host has made itself of the guest's archive, or the bytes of a disk; no file system of a guest's is mounted.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{LayerError, LayerTarget, StagingDir};
use crate::process;

const CP: [&str; 6] =
    ["--no-dereference", "--recursive", "--no-target-directory", "--reflink=auto", "--sparse=auto", "--"];
const ALL_ATTRIBUTES: &str = "--preserve=mode,ownership,timestamps,links,xattr";

/// Which directory a layer is, of all that have had its name.
///
/// # Errors
/// It is not there.
pub fn identity(dir: &Path) -> Result<String, LayerError> {
    let metadata = fs::metadata(dir).map_err(staging("look at", dir))?;
    // Numbers of inodes are used again; a directory that was exchanged is not changed after that.
    Ok(format!("{}-{}.{:09}", metadata.ino(), metadata.ctime(), metadata.ctime_nsec()))
}

/// Where two snapshots have what their containers write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerCopy {
    Directories { from: LayerTarget, to: LayerTarget },
    Disks { from: PathBuf, to: PathBuf },
}

impl LayerCopy {
    /// The writes of the container must not go on meanwhile.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Disks { .. })
    }

    /// Makes the new one equal to the old one, whose identity a checkpoint has told. Blocks.
    ///
    /// # Errors
    /// It is not that one any more; no space; cp is missing.
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
    let staging = StagingDir::beside(to)?;
    run_cp(&[ALL_ATTRIBUTES], from, &staging.fresh_path())?;
    unchanged()?;
    staging.exchange().map(drop)
}

fn run_cp(more: &[&str], from: &Path, to: &Path) -> Result<(), LayerError> {
    let args = more.iter().chain(&CP).map(AsRef::as_ref).chain([from.as_os_str(), to.as_os_str()]);
    let ran = process::run("cp", args, &[]);
    ran.map(drop).map_err(|source| LayerError::Copy { path: from.to_owned(), source })
}

fn staging(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayerError {
    let path = path.to_owned();
    move |source| LayerError::Place { action, path, source }
}
