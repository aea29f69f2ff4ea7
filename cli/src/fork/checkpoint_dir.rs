//! The directory of the checkpoint that a fork is restored from: one that the user has named, or a temporary
//! one.
//!
//! ```text
//!   <rootdisk.dir>/forks/XXXXXX/   locked by its fork; an unlocked one was left by a killed fork
//! ```

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use machinen::{
    checkpoint::{self, CheckpointError, CheckpointManifest},
    error::chain,
};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::error::ForkError;

/// A directory for a checkpoint, which no other fork uses.
#[derive(Debug)]
pub(super) struct CheckpointDir {
    path: PathBuf,
    /// The user has named the directory and keeps the checkpoint.
    kept: bool,
    /// The fork has made the directory.
    created: bool,
    _lock: File,
}

impl CheckpointDir {
    /// # Errors
    /// The directory is not empty, another fork uses it, or it cannot be made.
    pub(super) fn at(checkpoint_dir: Option<&Path>, cache: &Path) -> Result<Self, ForkError> {
        match checkpoint_dir {
            Some(path) => kept(path),
            None => temporary(&cache.join("forks")),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept
    }

    /// Removes a checkpoint that cannot be used, so that the next one finds an empty directory. Blocks.
    ///
    /// # Errors
    /// A file of the checkpoint cannot be removed.
    pub(super) fn clear(&self) -> Result<(), ForkError> {
        match checkpoint::clear(&self.path) {
            Err(CheckpointError::NoManifest { .. }) => Ok(()),
            cleared => Ok(cleared?),
        }
    }

    /// # Errors
    /// A file of the checkpoint cannot be removed.
    pub(super) fn remove(&self) -> Result<(), ForkError> {
        if !self.kept {
            return ignore_not_found(fs::remove_dir_all(&self.path), &self.path);
        }
        // Removes only what the checkpoint has made there.
        self.clear()?;
        match fs::remove_dir(&self.path) {
            Err(error) if self.created && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                ignore_not_found(Err(error), &self.path)
            }
            _ => Ok(()),
        }
    }
}

/// The checkpoint of `source` in a directory, compared with all of its digests. None if there is no such
/// checkpoint. Blocks.
///
/// # Errors
/// The checkpoint is incomplete.
pub(super) fn verified(path: &Path, source: &str) -> Result<Option<CheckpointManifest>, ForkError> {
    match checkpoint::verify(path) {
        Err(CheckpointError::NoManifest { .. }) => Ok(None),
        verified => Ok(Some(verified?).filter(|manifest| manifest.container == source)),
    }
}

fn kept(path: &Path) -> Result<CheckpointDir, ForkError> {
    let path = std::path::absolute(path).map_err(ForkError::file("find", path))?;
    let created = match DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(ForkError::file("make the directory", path)(error)),
    };
    let lock = File::open(&path).map_err(ForkError::file("open", &path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(ForkError::CheckpointDirInUse { path }),
        locked => locked.map_err(|errno| ForkError::file("lock", &path)(errno.into()))?,
    }
    match fs::read_dir(&path).map_err(ForkError::file("read", &path))?.next() {
        Some(_) => Err(ForkError::CheckpointDirNotEmpty { path }),
        None => Ok(CheckpointDir { path, kept: true, created, _lock: lock }),
    }
}

fn temporary(dir: &Path) -> Result<CheckpointDir, ForkError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(ForkError::file("make", dir))?;
    let guard = File::open(dir).map_err(ForkError::file("open", dir))?;
    // A fork holds this lock while it makes its directory and removes those of killed forks.
    let locked = flock(&guard, FlockOperation::LockExclusive);
    locked.map_err(|errno| ForkError::file("lock", dir)(errno.into()))?;
    sweep(dir)?;
    let path = tempfile::tempdir_in(dir).map_err(ForkError::file("make a directory in", dir))?.keep();
    let lock = File::open(&path).map_err(ForkError::file("open", &path))?;
    let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
    locked.map_err(|errno| ForkError::file("lock", &path)(errno.into()))?;
    Ok(CheckpointDir { path, kept: false, created: true, _lock: lock })
}

fn sweep(dir: &Path) -> Result<(), ForkError> {
    for entry in fs::read_dir(dir).map_err(ForkError::file("read", dir))? {
        let path = entry.map_err(ForkError::file("read", dir))?.path();
        // The fork of this directory may have removed it meanwhile.
        let Ok(left) = File::open(&path) else { continue };
        if flock(&left, FlockOperation::NonBlockingLockExclusive).is_ok()
            && let Err(error) = ignore_not_found(fs::remove_dir_all(&path), &path)
        {
            // A shim may still write there. The next fork tries again.
            eprintln!("machinen: images of an earlier fork: {}", chain(&error));
        }
    }
    Ok(())
}

fn ignore_not_found(removed: io::Result<()>, path: &Path) -> Result<(), ForkError> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ForkError::file("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_fork_has_left_is_removed_and_what_is_in_use_stays() {
        let cache = tempfile::tempdir().unwrap();
        let mine = CheckpointDir::at(None, cache.path()).unwrap();
        fs::write(mine.path().join("pages-1.img"), "x").unwrap();
        let left = cache.path().join("forks/left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("pages-1.img"), "x").unwrap();
        let other = CheckpointDir::at(None, cache.path()).unwrap();
        assert!(!left.exists() && mine.path().join("pages-1.img").exists());
        mine.remove().unwrap();
        other.remove().unwrap();
        assert_eq!(fs::read_dir(cache.path().join("forks")).unwrap().count(), 0);
    }

    #[test]
    fn a_checkpoint_needs_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint_dir =
            |name: &str| CheckpointDir::at(Some(&dir.path().join(name)), Path::new("/nowhere"));
        let new = checkpoint_dir("new").unwrap();
        assert!(new.is_kept() && matches!(checkpoint_dir("new"), Err(ForkError::CheckpointDirInUse { .. })));
        new.remove().unwrap();
        assert!(!dir.path().join("new").exists());
        assert!(checkpoint_dir("no/where").unwrap_err().to_string().starts_with("cannot make"));
        fs::create_dir(dir.path().join("used")).unwrap();
        let empty = checkpoint_dir("used").unwrap();
        fs::write(dir.path().join("used/file"), "mine").unwrap();
        // The directory has no files of a checkpoint.
        empty.remove().unwrap();
        drop(empty);
        assert!(matches!(checkpoint_dir("used"), Err(ForkError::CheckpointDirNotEmpty { .. })));
        assert!(dir.path().join("used/file").exists());
    }

    #[test]
    fn a_checkpoint_is_complete_if_its_manifest_and_its_images_say_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(verified(dir.path(), "one").unwrap().is_none());
        let image = checkpoint::ImageDigest {
            name: "core-1.img".into(),
            size: 1,
            // Of "x".
            sha256: "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881".into(),
            parts: Vec::new(),
        };
        let manifest = CheckpointManifest {
            format: checkpoint::FORMAT,
            arch: std::env::consts::ARCH.to_owned(),
            container: "one".to_owned(),
            files: vec![image],
            ..CheckpointManifest::default()
        };
        let text = serde_json::to_vec(&manifest).unwrap();
        fs::write(dir.path().join(checkpoint::MANIFEST), text).unwrap();
        assert!(matches!(verified(dir.path(), "one"), Err(ForkError::Checkpoint(_))));
        fs::write(dir.path().join("core-1.img"), "x").unwrap();
        assert_eq!(verified(dir.path(), "one").unwrap(), Some(manifest));
        assert_eq!(verified(dir.path(), "another").unwrap(), None);
    }
}
