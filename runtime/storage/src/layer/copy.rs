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
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use machinen_base::{
    fs::FileError,
    process::{Jail, JailFiles, ReservedUser, ResourceLimits, RunAs, Spawn, SystemCalls, ToolOutput},
};

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
    let copied = run_cp(&[ALL_ATTRIBUTES], from, &staging.fresh_path());
    // The removal of a directory that was replaced may also be why cp has failed.
    unchanged()?;
    copied?;
    staging.exchange().map(drop)
}

/// Runs cp in a jail that shows it `from`, and the directory of `to` as its working directory.
fn run_cp(more: &[&str], from: &Path, to: &Path) -> Result<(), LayerError> {
    let failed = |source| LayerError::Copy { path: from.to_owned(), source };
    let from = from.canonicalize().map_err(FileError::at("find", from))?;
    let (Some(dir), Some(name)) = (to.parent(), to.file_name()) else {
        return Err(FileError::new("copy to", to, io::ErrorKind::InvalidInput).into());
    };
    let user = ReservedUser::reserve()?;
    let args = more.iter().chain(&CP).map(AsRef::as_ref).chain([from.as_os_str(), name]);
    let spawn = Spawn::new("cp").args(args).env("LC_ALL", "C");
    let ran = spawn.jail(jail(&from, dir, user.run_as(Vec::new()))).run().and_then(ToolOutput::success);
    ran.map(drop).map_err(failed)
}

/// What cp calls besides what every program does.
const CALLS: [i64; 34] = [
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getxattr,
    libc::SYS_ioctl,
    libc::SYS_lchown,
    libc::SYS_lgetxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    libc::SYS_lsetxattr,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_prctl,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_mknod,
];
/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN for the attributes `trusted.*`, MKNOD, and SETFCAP: what a copy with all
/// attributes takes.
const CAPABILITIES: [u8; 7] = [0, 1, 3, 4, 21, 27, 31];

fn jail(from: &Path, to: &Path, identity: RunAs) -> Jail {
    let files = JailFiles {
        readable: vec![from.to_owned()],
        working_dir: Some(to.to_owned()),
        ..JailFiles::default()
    };
    let limits = ResourceLimits {
        open_files: Some(256),
        processes: Some(1),
        locked_memory: Some(0),
        ..ResourceLimits::default()
    };
    Jail {
        files: Some(files),
        capabilities: Some(CAPABILITIES.to_vec()),
        limits,
        system_calls: Some(SystemCalls::basic().and(&CALLS)),
        ..Jail::strict(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_over_cp_reaches_nothing_but_its_two_directories() {
        let dir = tempfile::tempdir().unwrap();
        let user = ReservedUser::reserve().unwrap();
        let jail = jail(dir.path(), dir.path(), user.run_as(Vec::new()));
        assert_eq!(jail.system_calls.as_ref().unwrap().forbidden(), None);
        let kept = CAPABILITIES.iter().fold(0, |mask, capability| mask | 1 << capability);
        let holes = machinen_base::process::probe(&jail, kept).unwrap();
        // It sees the directory above its own ones.
        assert_eq!(holes, ["sees /tmp"]);
    }
}
