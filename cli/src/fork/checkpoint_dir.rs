//! The directory of the checkpoint that a fork is restored from: one that the user has named, or a temporary
//! one.
//!
//! ```text
//!   <rootdisk.dir>/forks/XXXXXX/   locked by its fork; an unlocked one was left by a killed fork
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use machinen::{
    checkpoint::{self, CheckpointError, CheckpointManifest},
    error::chain,
    fs::{
        FileError, create_private_dir, create_private_dirs, if_exists, lock, remove_dir_if_exists, try_lock,
    },
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
            remove_dir_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
            return Ok(());
        }
        // Removes only what the checkpoint has made there.
        self.clear()?;
        match if_exists(fs::remove_dir(&self.path)) {
            Err(error) if self.created && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(FileError::at("remove", &self.path)(error).into())
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
    let path = std::path::absolute(path).map_err(FileError::at("find", path))?;
    let created = create_private_dir(&path).map_err(FileError::at("make the directory", &path))?;
    let lock = File::open(&path).map_err(FileError::at("open", &path))?;
    if !try_lock(&lock).map_err(FileError::at("lock", &path))? {
        return Err(ForkError::CheckpointDirInUse { path });
    }
    match fs::read_dir(&path).map_err(FileError::at("read", &path))?.next() {
        Some(_) => Err(ForkError::CheckpointDirNotEmpty { path }),
        None => Ok(CheckpointDir { path, kept: true, created, _lock: lock }),
    }
}

fn temporary(dir: &Path) -> Result<CheckpointDir, ForkError> {
    create_private_dirs(dir).map_err(FileError::at("make", dir))?;
    let guard = File::open(dir).map_err(FileError::at("open", dir))?;
    // A fork holds this lock while it makes its directory and removes those of killed forks.
    lock(&guard).map_err(FileError::at("lock", dir))?;
    sweep(dir)?;
    let path = tempfile::tempdir_in(dir).map_err(FileError::at("make a directory in", dir))?.keep();
    let own = File::open(&path).map_err(FileError::at("open", &path))?;
    if !try_lock(&own).map_err(FileError::at("lock", &path))? {
        return Err(ForkError::CheckpointDirInUse { path });
    }
    Ok(CheckpointDir { path, kept: false, created: true, _lock: own })
}

/// The directories that killed forks have left below the cache of disks. Removes them unless `dry_run`.
///
/// # Errors
/// A directory cannot be read or removed.
pub(crate) fn left_over(cache: &Path, dry_run: bool) -> Result<Vec<PathBuf>, FileError> {
    let dir = cache.join("forks");
    let mut left_over = Vec::new();
    let Some(guard) = if_exists(File::open(&dir)).map_err(FileError::at("open", &dir))? else {
        return Ok(left_over);
    };
    lock(&guard).map_err(FileError::at("lock", &dir))?;
    for entry in fs::read_dir(&dir).map_err(FileError::at("read", &dir))? {
        let path = entry.map_err(FileError::at("read", &dir))?.path();
        // The fork of this directory may have removed it meanwhile.
        let Ok(left) = File::open(&path) else { continue };
        if try_lock(&left).map_err(FileError::at("lock", &path))? {
            if !dry_run {
                remove_dir_if_exists(&path).map_err(FileError::at("remove", &path))?;
            }
            left_over.push(path);
        }
    }
    Ok(left_over)
}

fn sweep(dir: &Path) -> Result<(), ForkError> {
    for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
        let path = entry.map_err(FileError::at("read", dir))?.path();
        // The fork of this directory may have removed it meanwhile.
        let Ok(left) = File::open(&path) else { continue };
        if try_lock(&left).map_err(FileError::at("lock", &path))?
            && let Err(error) = remove_dir_if_exists(&path).map_err(FileError::at("remove", &path))
        {
            // A shim may still write there. The next fork tries again.
            eprintln!("machinen: images of an earlier fork: {}", chain(&error));
        }
    }
    Ok(())
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
