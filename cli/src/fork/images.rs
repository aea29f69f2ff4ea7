//! Where the images of a fork's checkpoint are: in the directory that the user has named, or in one that goes with the fork.
//!
//! ```text
//!   <rootdisk.dir>/forks/XXXXXX/   locked by the fork that has made it; what nobody holds was left by one that was killed
//! ```

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use machinen::{
    checkpoint::{self, CheckpointError},
    error::chain,
};
use rustix::fs::{FlockOperation, flock};

use super::error::ForkError;

/// A directory for images.
#[derive(Debug)]
pub(super) enum Images {
    Kept(PathBuf),
    Temporary { path: PathBuf, _lock: File },
}

impl Images {
    /// # Errors
    /// There is something in the directory, or none can be made.
    pub(super) fn at(bundle: Option<&Path>, cache: &Path) -> Result<Self, ForkError> {
        match bundle {
            Some(path) => kept(path),
            None => temporary(&cache.join("forks")),
        }
    }

    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Kept(path) | Self::Temporary { path, .. } => path,
        }
    }

    pub(super) fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    /// # Errors
    /// Something of it cannot be removed.
    pub(super) fn remove(&self) -> Result<(), ForkError> {
        let path = self.path();
        match self {
            // Only what a checkpoint has made there.
            Self::Kept(_) => match checkpoint::remove(path) {
                Err(CheckpointError::NoManifest { .. }) => Ok(()),
                removed => Ok(removed?),
            },
            Self::Temporary { .. } => gone(fs::remove_dir_all(path), path),
        }
    }
}

fn kept(path: &Path) -> Result<Images, ForkError> {
    let path = std::path::absolute(path).map_err(ForkError::file("find", path))?;
    let parent = path.parent().unwrap_or(&path);
    match fs::read_dir(&path).map(|mut entries| entries.next()) {
        Ok(Some(_)) => Err(ForkError::BundleNotEmpty { path }),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ForkError::file("read", path)(error)),
        Err(_) if !parent.is_dir() => Err(ForkError::file("find", parent)(io::ErrorKind::NotFound.into())),
        _ => Ok(Images::Kept(path)),
    }
}

fn temporary(dir: &Path) -> Result<Images, ForkError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(ForkError::file("make", dir))?;
    let guard = File::open(dir).map_err(ForkError::file("open", dir))?;
    // Whoever makes one or looks for what is left holds it.
    let locked = flock(&guard, FlockOperation::LockExclusive);
    locked.map_err(|errno| ForkError::file("lock", dir)(errno.into()))?;
    sweep(dir)?;
    let path = tempfile::tempdir_in(dir).map_err(ForkError::file("make a directory in", dir))?.keep();
    let lock = File::open(&path).map_err(ForkError::file("open", &path))?;
    let locked = flock(&lock, FlockOperation::NonBlockingLockExclusive);
    locked.map_err(|errno| ForkError::file("lock", &path)(errno.into()))?;
    Ok(Images::Temporary { path, _lock: lock })
}

fn sweep(dir: &Path) -> Result<(), ForkError> {
    for entry in fs::read_dir(dir).map_err(ForkError::file("read", dir))? {
        let path = entry.map_err(ForkError::file("read", dir))?.path();
        // One that is removed by its fork meanwhile.
        let Ok(left) = File::open(&path) else { continue };
        if flock(&left, FlockOperation::NonBlockingLockExclusive).is_ok()
            && let Err(error) = gone(fs::remove_dir_all(&path), &path)
        {
            // A shim may still write there; the next fork finds it.
            eprintln!("machinen: what an earlier fork has left: {}", chain(&error));
        }
    }
    Ok(())
}

fn gone(removed: io::Result<()>, path: &Path) -> Result<(), ForkError> {
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
        let mine = Images::at(None, cache.path()).unwrap();
        fs::write(mine.path().join("pages-1.img"), "x").unwrap();
        let left = cache.path().join("forks/left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("pages-1.img"), "x").unwrap();
        let other = Images::at(None, cache.path()).unwrap();
        assert!(!left.exists() && mine.path().join("pages-1.img").exists());
        mine.remove().unwrap();
        other.remove().unwrap();
        assert_eq!(fs::read_dir(cache.path().join("forks")).unwrap().count(), 0);
    }

    #[test]
    fn a_bundle_has_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let images = |name: &str| Images::at(Some(&dir.path().join(name)), Path::new("/nowhere"));
        assert!(images("new").unwrap().is_kept());
        assert!(images("no/where").unwrap_err().to_string().starts_with("cannot find"));
        fs::create_dir(dir.path().join("used")).unwrap();
        let empty = images("used").unwrap();
        fs::write(dir.path().join("used/file"), "mine").unwrap();
        assert!(matches!(images("used"), Err(ForkError::BundleNotEmpty { .. })));
        // Nothing of a checkpoint is there.
        empty.remove().unwrap();
        assert!(dir.path().join("used/file").exists());
    }
}
