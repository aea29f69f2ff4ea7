//! The staging directory, in which a new layer is made, and the atomic exchange with the old layer.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, create_new_private_dir};
use rustix::{
    fs::{CWD, Mode, OFlags, RenameFlags, fsync, open, renameat_with, syncfs},
    io::Errno,
};

use super::{LayerError, apply::directory_flags};

const FRESH: &str = "fresh";

/// A directory next to a layer, on the same file system, which only root can enter. Dropping it removes it
/// and its content.
#[derive(Debug)]
pub struct StagingDir {
    target: PathBuf,
    dir: PathBuf,
    fresh: OwnedFd,
}

impl StagingDir {
    /// Makes the empty directory that will be exchanged with `target`, which must exist.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn next_to(target: &Path) -> Result<Self, LayerError> {
        let (parent, prefix) = parts(target);
        let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
        let made = made.map_err(FileError::at("make a directory in", parent))?;
        let path = made.path().join(FRESH);
        let failed = |source: io::Error| FileError::new("make the directory", &path, source);
        create_new_private_dir(&path).map_err(failed)?;
        let fresh = open(&path, directory_flags(), Mode::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(Self { target: target.to_owned(), dir: made.keep(), fresh })
    }

    /// The directory to fill.
    pub fn fresh(&self) -> BorrowedFd<'_> {
        self.fresh.as_fd()
    }

    /// The path of the directory to fill.
    pub fn fresh_path(&self) -> PathBuf {
        self.dir.join(FRESH)
    }

    /// Opens the current layer.
    ///
    /// # Errors
    /// The layer cannot be opened.
    pub fn current(&self) -> Result<OwnedFd, LayerError> {
        let opened = open(&self.target, directory_flags(), Mode::empty());
        Ok(opened.map_err(|errno| FileError::new("open", &self.target, errno))?)
    }

    /// Exchanges the directory with the layer.
    ///
    /// # Errors
    /// The exchange is not possible. The old layer is still in place.
    pub fn exchange(self) -> Result<PreviousLayer, LayerError> {
        let fresh = self.dir.join(FRESH);
        match renameat_with(CWD, &fresh, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(PreviousLayer { _old: self }),
            Err(Errno::BUSY | Errno::XDEV) => Err(LayerError::MountPoint { path: self.target.clone() }),
            Err(errno) => Err(FileError::new("replace", &self.target, errno).into()),
        }
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// A layer that has been replaced. Dropping it removes the files of the old layer.
#[derive(Debug)]
pub struct PreviousLayer {
    _old: StagingDir,
}

impl PreviousLayer {
    /// Returns when the new layer is on stable storage.
    ///
    /// # Errors
    /// The layer cannot be written back.
    pub fn sync(&self) -> Result<(), LayerError> {
        let StagingDir { target, fresh, .. } = &self._old;
        let failed = |errno: Errno| FileError::new("write back", target, errno);
        syncfs(fresh).map_err(failed)?;
        let parent =
            open(parts(target).0, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Ok(parent.and_then(fsync).map_err(failed)?)
    }
}

/// Removes what killed exports to `target` have left. No export to it may be running.
///
/// # Errors
/// The directory cannot be listed.
pub fn sweep(target: &Path) -> Result<(), LayerError> {
    let (parent, prefix) = parts(target);
    let failed = |source: io::Error| FileError::new("list", parent, source);
    for entry in fs::read_dir(parent).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // The rest of the name is random and has no dash, unlike the rest for a layer with a longer name.
        if name.as_bytes().strip_prefix(prefix.as_bytes()).is_some_and(|rest| !rest.contains(&b'-')) {
            remove(&parent.join(name));
        }
    }
    Ok(())
}

fn parts(target: &Path) -> (&Path, OsString) {
    let parent = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut prefix = OsString::from(".machinen-");
    prefix.push(target.file_name().unwrap_or(OsStr::new("layer")));
    prefix.push("-");
    (parent, prefix)
}

fn remove(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::warn!(path = %dir.display(), "cannot remove what an export has left: {error}");
    }
}
