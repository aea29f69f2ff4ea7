//! Where a new layer is made, and how it takes the place of the old one: at once, or not at all.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, RenameFlags, fsync, open, renameat_with, syncfs},
    io::Errno,
};

use super::{LayerError, apply::directory_flags};

const FRESH: &str = "fresh";

/// A directory beside a layer, on the same file system, that only root can enter; removed with all that is in it when this
/// is dropped.
#[derive(Debug)]
pub struct StagingDir {
    target: PathBuf,
    dir: PathBuf,
    fresh: OwnedFd,
}

impl StagingDir {
    /// Makes the empty directory that will be exchanged with `target`, which must be there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn beside(target: &Path) -> Result<Self, LayerError> {
        let (parent, prefix) = parts(target);
        let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
        let made = made.map_err(|source| LayerError::Place {
            action: "make a directory in",
            path: parent.into(),
            source,
        })?;
        let path = made.path().join(FRESH);
        let failed = |source: io::Error| LayerError::Place {
            action: "make the directory",
            path: path.clone(),
            source,
        };
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let fresh = open(&path, directory_flags(), Mode::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(Self { target: target.to_owned(), dir: made.keep(), fresh })
    }

    /// The directory to fill.
    pub fn fresh(&self) -> BorrowedFd<'_> {
        self.fresh.as_fd()
    }

    /// Where that is.
    pub fn fresh_path(&self) -> PathBuf {
        self.dir.join(FRESH)
    }

    /// The layer that is there now.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn current(&self) -> Result<OwnedFd, LayerError> {
        open(&self.target, directory_flags(), Mode::empty()).map_err(|errno| LayerError::Place {
            action: "open",
            path: self.target.clone(),
            source: errno.into(),
        })
    }

    /// Puts the directory in the layer's place.
    ///
    /// # Errors
    /// The old layer is still there then.
    pub fn exchange(self) -> Result<PreviousLayer, LayerError> {
        let fresh = self.dir.join(FRESH);
        match renameat_with(CWD, &fresh, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(PreviousLayer { _old: self }),
            Err(Errno::BUSY | Errno::XDEV) => Err(LayerError::MountPoint { path: self.target.clone() }),
            Err(errno) => {
                Err(LayerError::Place { action: "replace", path: self.target.clone(), source: errno.into() })
            }
        }
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// A layer that has been replaced. Dropping it removes the old one.
#[derive(Debug)]
pub struct PreviousLayer {
    _old: StagingDir,
}

impl PreviousLayer {
    /// Returns when the new layer has reached the medium.
    ///
    /// # Errors
    /// Those of the medium.
    pub fn sync(&self) -> Result<(), LayerError> {
        let StagingDir { target, fresh, .. } = &self._old;
        let failed = |errno: Errno| LayerError::Place {
            action: "write back",
            path: target.clone(),
            source: errno.into(),
        };
        syncfs(fresh).map_err(failed)?;
        let parent =
            open(parts(target).0, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        parent.and_then(fsync).map_err(failed)
    }
}

/// Removes what exports to `target` left when they were killed. None may be under way.
///
/// # Errors
/// The directory cannot be listed.
pub fn sweep(target: &Path) -> Result<(), LayerError> {
    let (parent, prefix) = parts(target);
    let failed = |source| LayerError::Place { action: "list", path: parent.to_owned(), source };
    for entry in fs::read_dir(parent).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // What follows is random and has no dash: the rest of a neighbour's longer name would.
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
