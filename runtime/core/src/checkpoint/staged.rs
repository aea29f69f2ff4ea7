//! The directory in which a new checkpoint is written: the one that the caller names, or, if that has an earlier checkpoint,
//! a directory next to it, which takes its place when the new checkpoint is complete. Until then the earlier one is whole.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::File,
    path::{Path, PathBuf},
};

use machinen_base::error::chain;
use rustix::fs::{RenameFlags, renameat_with};
use tempfile::TempDir;

use super::{CheckpointError, directory::CheckpointDir, files, manifest::CheckpointManifest};

/// Where a new checkpoint is written. Dropping this leaves the caller's directory as it is.
#[derive(Debug)]
pub(crate) struct StagedCheckpoint {
    path: PathBuf,
    replacement: Option<Replacement>,
}

/// A directory next to that of an earlier checkpoint.
#[derive(Debug)]
struct Replacement {
    staging: TempDir,
    /// The directory that has both of them. Its path may lead elsewhere by the time of the exchange.
    parent: File,
    name: OsString,
}

impl StagedCheckpoint {
    /// Decides where the checkpoint for `path` is written. Blocks.
    ///
    /// # Errors
    /// The directory has other files than those of a checkpoint, or belongs to another user.
    pub(crate) fn prepare(path: &Path) -> Result<Self, CheckpointError> {
        let in_place = Self { path: path.to_owned(), replacement: None };
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(in_place) };
        if !path.try_exists().map_err(CheckpointError::file("read", path))? {
            return Ok(in_place);
        }
        let mut names = CheckpointDir::open(path)?.names().map_err(CheckpointError::file("read", path))?;
        if names.is_empty() {
            return Ok(in_place);
        }
        let manifest = match CheckpointManifest::read(path) {
            Ok(manifest) => Some(manifest),
            Err(CheckpointError::NoManifest { .. }) => None,
            Err(error) => return Err(error),
        };
        let known: HashSet<_> = manifest.iter().flat_map(CheckpointManifest::names).map(OsStr::new).collect();
        names.retain(|name| !known.contains(name.as_os_str()));
        if let Some(other) = names.pop() {
            return Err(CheckpointError::NotEmpty { path: path.to_owned(), other });
        }
        let mut prefix = OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let staging = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
        let replacement = Replacement {
            staging: staging.map_err(CheckpointError::file("create a directory in", parent))?,
            parent: File::open(parent).map_err(CheckpointError::file("open", parent))?,
            name: name.to_owned(),
        };
        Ok(Self { replacement: Some(replacement), ..in_place })
    }

    /// The directory for the files.
    pub(crate) fn dir(&self) -> &Path {
        self.replacement.as_ref().map_or(&self.path, |replacement| replacement.staging.path())
    }

    /// Puts the checkpoint, which is complete, in the place of the earlier one, and removes that. Blocks.
    ///
    /// # Errors
    /// The file system cannot exchange directories. The earlier checkpoint is unchanged then.
    pub(crate) fn commit(self) -> Result<(), CheckpointError> {
        let Some(Replacement { staging, parent, name }) = self.replacement else { return Ok(()) };
        let new = staging.path().file_name().unwrap_or_default();
        renameat_with(&parent, new, &parent, &name, RenameFlags::EXCHANGE)
            .map_err(|errno| CheckpointError::file("replace the checkpoint", &self.path)(errno.into()))?;
        parent.sync_all().map_err(CheckpointError::file("write", &self.path))?;
        let earlier = staging.keep();
        if let Err(error) = files::remove(&earlier) {
            tracing::warn!("cannot remove the earlier checkpoint: {}", chain(&error));
        }
        Ok(())
    }

    /// Removes what was written. Blocks.
    pub(crate) fn discard(self) {
        // Dropping a replacement removes it.
        if self.replacement.is_none()
            && let Err(error) = files::remove(&self.path)
        {
            tracing::warn!("{}", chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checkpoint::{FORMAT, ImageDigest, MANIFEST};

    /// Writes a checkpoint with one image.
    fn write(dir: &Path, image: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(image), image).unwrap();
        let (name, size, sha256) = (image.to_owned(), image.len() as u64, "0".repeat(64));
        let files = vec![ImageDigest { name, size, sha256, parts: Vec::new() }];
        let manifest = CheckpointManifest {
            format: FORMAT,
            arch: std::env::consts::ARCH.to_owned(),
            files,
            ..CheckpointManifest::default()
        };
        fs::write(dir.join(MANIFEST), serde_json::to_string(&manifest).unwrap()).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_or_empty_directory_is_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        assert_eq!(StagedCheckpoint::prepare(&path).unwrap().dir(), path);
        fs::create_dir(&path).unwrap();
        let place = StagedCheckpoint::prepare(&path).unwrap();
        assert_eq!(place.dir(), path);
        write(&path, "a.img");
        place.commit().unwrap();
        assert_eq!(names(&path), ["a.img", MANIFEST]);
    }

    #[test]
    fn an_earlier_checkpoint_is_whole_until_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        write(&path, "a.img");
        for (new, fails) in [("b.img", true), ("b.img", false)] {
            let place = StagedCheckpoint::prepare(&path).unwrap();
            assert_ne!(place.dir(), path);
            write(place.dir(), new);
            assert_eq!(names(&path), ["a.img", MANIFEST]);
            if fails {
                place.discard();
            } else {
                place.commit().unwrap();
            }
            assert_eq!(names(dir.path()), ["c"]);
        }
        assert_eq!(names(&path), ["b.img", MANIFEST]);
    }

    #[test]
    fn a_directory_with_other_files_is_refused_by_the_name_of_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "x").unwrap();
        let refused = || StagedCheckpoint::prepare(dir.path()).unwrap_err().to_string();
        assert!(refused().contains("mine"), "{}", refused());
        write(dir.path(), "a.img");
        assert!(refused().contains("mine"), "{}", refused());
        assert_eq!(names(dir.path()), ["a.img", MANIFEST, "mine"]);
    }
}
