//! What is kept of a build while it runs, so that `machinen gc` finds what one has left that was killed.
//!
//! ```text
//!   boot.dir/builds/ID   names the container and the place of the unfinished image; locked as long as the build runs
//! ```
//! The record is there before both, and is removed after them. The directory is locked while a record is made or looked at,
//! so one that is not locked has lost its build.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use machinen::fs::{
    FileError, create_private_dirs, if_exists, lock, remove_dir_if_exists, remove_if_exists, try_lock,
};
use serde::{Deserialize, Serialize};

use crate::oci::{OciError, create::destroy_by_force, state::StateDir};

/// The directory of the records, below `boot.dir`.
const BUILDS: &str = "builds";
/// The beginning of the name of a directory with an unfinished image.
const UNFINISHED: &str = ".machinen-";
/// Most bytes of a record: two paths.
const MAX_RECORD: u64 = 64 << 10;

/// Where the parts of a build are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BuildRecord {
    /// The directory of the container's state, `ROOT/ID`.
    pub(super) container: PathBuf,
    /// The directory in which the image is written.
    pub(super) unfinished: PathBuf,
}

/// A record of a build that runs. It is removed when this is dropped, which has to be after everything that it names.
#[derive(Debug)]
pub(super) struct HeldRecord {
    pub(super) record: BuildRecord,
    path: PathBuf,
    _locked: File,
}

/// What a build has left that was killed.
#[derive(Debug)]
pub(crate) struct LeftBuild {
    /// Nothing if it was killed while the record was written, before anything else was there.
    record: Option<BuildRecord>,
    path: PathBuf,
}

impl HeldRecord {
    /// Records that the build `id` is to make `target`, with a container of the same id below `root`.
    ///
    /// # Errors
    /// The file system refuses.
    pub(super) fn write(boot_dir: &Path, id: &str, root: &Path, target: &Path) -> Result<Self, FileError> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(FileError::at("find", path));
        let target = absolute(target)?;
        let unfinished = target.with_file_name(format!("{UNFINISHED}{id}"));
        let record = BuildRecord { container: absolute(root)?.join(id), unfinished };
        let dir = boot_dir.join(BUILDS);
        create_private_dirs(&dir).map_err(FileError::at("create the directory", &dir))?;
        let _locked = locked(&dir)?;
        let path = dir.join(id);
        let failed = || FileError::at("write", &path);
        let mut file = File::options().write(true).create_new(true).open(&path).map_err(failed())?;
        let written = lock(&file)
            .and_then(|()| serde_json::to_vec(&record).map_err(io::Error::from))
            .and_then(|text| file.write_all(&text));
        if let Err(error) = written {
            // The first failure is the one to report.
            let _ = fs::remove_file(&path);
            return Err(failed()(error));
        }
        Ok(Self { record, path, _locked: file })
    }
}

impl Drop for HeldRecord {
    fn drop(&mut self) {
        // `gc` removes a record that stays.
        let _ = fs::remove_file(&self.path);
    }
}

fn locked(dir: &Path) -> Result<File, FileError> {
    let file = File::open(dir).map_err(FileError::at("open", dir))?;
    lock(&file).map_err(FileError::at("lock", dir))?;
    Ok(file)
}

/// The builds that were killed.
///
/// # Errors
/// The records cannot be listed or read.
pub(crate) fn left(boot_dir: &Path) -> Result<Vec<LeftBuild>, FileError> {
    let dir = boot_dir.join(BUILDS);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let _locked = locked(&dir)?;
    let mut left = Vec::new();
    for entry in fs::read_dir(&dir).map_err(FileError::at("list", &dir))? {
        let path = entry.map_err(FileError::at("list", &dir))?.path();
        let Some(file) = if_exists(File::open(&path)).map_err(FileError::at("open", &path))? else {
            continue;
        };
        if !try_lock(&file).map_err(FileError::at("lock", &path))? {
            continue;
        }
        let mut text = Vec::new();
        file.take(MAX_RECORD).read_to_end(&mut text).map_err(FileError::at("read", &path))?;
        left.push(LeftBuild { record: serde_json::from_slice(&text).ok(), path });
    }
    Ok(left)
}

impl LeftBuild {
    /// The record.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What there is of the build: its container, the unfinished image, and the record.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let parts = self.record.iter().flat_map(|record| [&record.container, &record.unfinished]);
        let mut paths: Vec<_> = parts.filter(|path| path.symlink_metadata().is_ok()).cloned().collect();
        paths.push(self.path.clone());
        paths
    }

    /// Removes all of it, the record last.
    ///
    /// # Errors
    /// A part cannot be removed. The record stays, so that `gc` can try again.
    pub(crate) async fn remove(&self) -> Result<(), OciError> {
        if let Some(BuildRecord { container, unfinished }) = &self.record {
            let id = container.file_name().and_then(|id| id.to_str()).unwrap_or_default();
            let root = container.parent().unwrap_or(container);
            match StateDir::find(root, id) {
                Ok(state) => destroy_by_force(root, &state).await?,
                Err(OciError::NoContainer { .. }) => {}
                Err(error) => return Err(error),
            }
            remove_dir_if_exists(unfinished).map_err(FileError::at("remove", unfinished))?;
        }
        remove_if_exists(&self.path).map_err(FileError::at("remove", &self.path))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, id: &str) -> HeldRecord {
        HeldRecord::write(dir, id, &dir.join("root"), &dir.join("image.tar")).unwrap()
    }

    #[test]
    fn a_build_that_runs_is_not_left() {
        let dir = tempfile::tempdir().unwrap();
        assert!(left(dir.path()).unwrap().is_empty());
        let held = write(dir.path(), "build-1");
        assert!(left(dir.path()).unwrap().is_empty());
        drop(held);
        assert!(left(dir.path()).unwrap().is_empty());
        assert!(!dir.path().join("builds/build-1").exists());
    }

    #[tokio::test]
    async fn what_a_killed_build_has_left_is_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let held = write(dir.path(), "build-2");
        let (path, record) = (held.path.clone(), held.record.clone());
        let text = fs::read(&path).unwrap();
        drop(held);
        // As after SIGKILL: the lock has ended with the process, and the file is still there.
        fs::write(&path, text).unwrap();
        fs::create_dir_all(record.unfinished.join("blobs")).unwrap();
        fs::write(dir.path().join("builds/build-3"), "{").unwrap();
        let mut builds = left(dir.path()).unwrap();
        builds.sort_by_key(LeftBuild::paths);
        let unfinished = dir.path().join(".machinen-build-2");
        let expected = vec![vec![unfinished.clone(), path], vec![dir.path().join("builds/build-3")]];
        assert_eq!(builds.iter().map(LeftBuild::paths).collect::<Vec<_>>(), expected);
        for build in &builds {
            build.remove().await.unwrap();
        }
        assert!(left(dir.path()).unwrap().is_empty() && !unfinished.exists());
    }
}
