//! The staging directory, in which a new layer is made, and the atomic exchange with the old layer.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use machinen_base::fs::{FileError, create_new_private_dir, lock_shared, try_lock};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, DirEntry, Mode, OFlags, RenameFlags, Statx, StatxFlags, fsync, open, renameat,
        renameat_with, statx, syncfs,
    },
    io::Errno,
};

use super::{LayerError, apply::directory_flags, merge::copy_metadata};

const FRESH: &str = "fresh";
const OLD: &str = "old";

/// A directory next to a layer, on the same file system, which only root can enter. Dropping it removes it
/// and its content.
#[derive(Debug)]
pub struct StagingDir {
    target: PathBuf,
    dir: PathBuf,
    fresh: OwnedFd,
    /// Keeps [`sweep`] away.
    _in_use: File,
}

impl StagingDir {
    /// Makes the empty directory that will be exchanged with `target`, which must exist.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn next_to(target: &Path) -> Result<Self, LayerError> {
        Self::make(target, parts(target).0)
    }

    /// Makes an empty directory from which files can be moved to `target`: next to it, or in it if it is a mount point.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn on_file_system_of(target: &Path) -> Result<Self, LayerError> {
        let (parent, _) = parts(target);
        let of = |path: &Path| -> Result<Statx, FileError> {
            let flags = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
            statx(CWD, path, AtFlags::empty(), flags).map_err(|errno| FileError::new("look at", path, errno))
        };
        let mount = |stat: Statx| (stat.stx_mnt_id, stat.stx_dev_major, stat.stx_dev_minor);
        let is_mount_point = mount(of(parent)?) != mount(of(target)?);
        Self::make(target, if is_mount_point { target } else { parent })
    }

    fn make(target: &Path, parent: &Path) -> Result<Self, LayerError> {
        let (_, prefix) = parts(target);
        let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
        let made = made.map_err(FileError::at("make a directory in", parent))?;
        let in_use = File::open(made.path()).and_then(|dir| lock_shared(&dir).map(|()| dir));
        let in_use = in_use.map_err(FileError::at("lock", made.path()))?;
        let path = made.path().join(FRESH);
        let failed = |source: io::Error| FileError::new("make the directory", &path, source);
        create_new_private_dir(&path).map_err(failed)?;
        let fresh = open(&path, directory_flags(), Mode::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(Self { target: target.to_owned(), dir: made.keep(), fresh, _in_use: in_use })
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

    /// To be called when the content of the directory has been moved to the layer.
    pub(super) fn merged(self) -> PreviousLayer {
        PreviousLayer { old: self }
    }

    /// Exchanges the directory with the layer.
    ///
    /// # Errors
    /// The exchange is not possible. The old layer is still in place.
    pub fn exchange(self) -> Result<PreviousLayer, LayerError> {
        let fresh = self.dir.join(FRESH);
        match renameat_with(CWD, &fresh, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(PreviousLayer { old: self }),
            Err(Errno::BUSY | Errno::XDEV) => Err(LayerError::MountPoint { path: self.target.clone() }),
            Err(errno) => Err(FileError::new("replace", &self.target, errno).into()),
        }
    }
}

impl StagingDir {
    /// Exchanges the content of the directory with that of the layer, which stays in place, one name after the other.
    ///
    /// # Errors
    /// A file cannot be moved. Then the layer has neither the old nor the new content, and the container's disk has
    /// the new one.
    pub(super) fn exchange_content(self) -> Result<PreviousLayer, LayerError> {
        let old_path = self.dir.join(OLD);
        create_new_private_dir(&old_path).map_err(FileError::at("make the directory", &old_path))?;
        let old = open(&old_path, directory_flags(), Mode::empty());
        let old = old.map_err(|errno| FileError::new("open", &old_path, errno))?;
        let target = self.current()?;
        let failed = |errno| FileError::new("exchange the content of", &self.target, errno);
        move_content(target.as_fd(), old.as_fd()).map_err(failed)?;
        let status = rustix::fs::fstat(&self.fresh).map_err(failed)?;
        move_content(self.fresh.as_fd(), target.as_fd()).map_err(failed)?;
        copy_metadata(self.fresh.as_fd(), &status, target.as_fd()).map_err(failed)?;
        Ok(PreviousLayer { old: self })
    }
}

fn move_content(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    // Listed before anything is moved: what a list has of a directory that changes is not defined (readdir(3)).
    let entries = Dir::read_from(from)?.collect::<Result<Vec<_>, _>>()?;
    let mut names = entries.iter().map(DirEntry::file_name);
    names.try_for_each(|name| match name.to_bytes() {
        b"." | b".." => Ok(()),
        _ => renameat(from, name, to, name),
    })
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        remove(&self.dir);
    }
}

/// A layer that has been replaced. Dropping it removes the files of the old layer. Of a layer that has stayed in place
/// there are none.
#[derive(Debug)]
pub struct PreviousLayer {
    old: StagingDir,
}

impl PreviousLayer {
    /// Opens the directory with the files of the old layer.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn files(&self) -> Result<OwnedFd, LayerError> {
        let path = self.old.fresh_path();
        Ok(open(&path, directory_flags(), Mode::empty())
            .map_err(|errno| FileError::new("open", &path, errno))?)
    }

    /// Returns when the new layer is on stable storage.
    ///
    /// # Errors
    /// The layer cannot be written back.
    pub fn sync(&self) -> Result<(), LayerError> {
        let StagingDir { target, fresh, .. } = &self.old;
        let failed = |errno: Errno| FileError::new("write back", target, errno);
        syncfs(fresh).map_err(failed)?;
        let parent =
            open(parts(target).0, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Ok(parent.and_then(fsync).map_err(failed)?)
    }
}

/// Removes what killed exports to `target` have left next to it.
///
/// # Errors
/// The directory cannot be listed.
pub fn sweep(target: &Path) -> Result<(), LayerError> {
    sweep_in(parts(target).0, target)
}

/// Removes what killed exports to `target` have left in it.
///
/// # Errors
/// The directory cannot be listed.
pub fn sweep_within(target: &Path) -> Result<(), LayerError> {
    sweep_in(target, target)
}

fn sweep_in(parent: &Path, target: &Path) -> Result<(), LayerError> {
    let (_, prefix) = parts(target);
    let failed = |source: io::Error| FileError::new("list", parent, source);
    for entry in fs::read_dir(parent).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        // The rest of the name is random and has no dash, unlike the rest for a layer with a longer name.
        if name.as_bytes().strip_prefix(prefix.as_bytes()).is_some_and(|rest| !rest.contains(&b'-')) {
            let dir = parent.join(name);
            // The directory of an export that is running is locked. What is no directory is not an export's.
            let opened = open(&dir, directory_flags(), Mode::empty()).map(File::from);
            if opened.is_ok_and(|opened| try_lock(&opened).is_ok_and(|unused| unused)) {
                remove(&dir);
            }
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
