//! The directory of a checkpoint, held by its descriptor. The directories above it may belong to anybody, who
//! can exchange it or put links in it at any time. So it is opened once, its owner is checked, and its files
//! are made and opened below the descriptor, without following a link.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use machinen_base::fs::{create_private_dir, if_exists};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, linkat, openat2, unlinkat};

use super::CheckpointError;

/// A directory that only root or the caller can write to, as far as its owner decides that.
#[derive(Debug)]
pub(super) struct CheckpointDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl CheckpointDir {
    /// Opens a directory, and creates it if it is missing. Returns whether it was created.
    ///
    /// # Errors
    /// The directory can be neither opened nor created, or belongs to another user.
    pub(super) fn open_or_create(path: &Path) -> Result<(Self, bool), CheckpointError> {
        let made = create_private_dir(path).map_err(CheckpointError::file("create", path))?;
        Ok((Self::open(path)?, made))
    }

    /// # Errors
    /// The path is not that of a directory, or the directory belongs to neither root nor the caller.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from);
        let dir = File::from(opened.map_err(CheckpointError::file("open", path))?);
        let owner = dir.metadata().map_err(CheckpointError::file("read", path))?.uid();
        if !is_trusted(owner) {
            return Err(CheckpointError::Owner { path: path.to_owned(), owner });
        }
        Ok(Self { fd: dir.into(), path: path.to_owned() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The names in the directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(super) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Duplicates the descriptor, for work that can reach no other directory.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// Creates a file, which must not exist.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub(super) fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat2(&self.fd, name, flags, Mode::RUSR | Mode::WUSR, beneath())?.into())
    }

    /// Creates a file in the place of another one, which is removed. A link is removed, and not followed.
    ///
    /// # Errors
    /// Those of unlinkat(2) and openat2(2).
    pub(super) fn replace(&self, name: &str) -> io::Result<File> {
        if_exists(self.remove(name))?;
        self.create(name)
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Those of openat2(2), or the file is not a regular one.
    pub(super) fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat2(&self.fd, name, flags, Mode::empty(), beneath())?);
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
        }
    }

    /// Gives a file of another directory the same name in this one.
    ///
    /// # Errors
    /// Those of linkat(2).
    pub(super) fn link_from(&self, other: &Self, name: &str) -> io::Result<()> {
        Ok(linkat(&other.fd, name, &self.fd, name, AtFlags::empty())?)
    }

    /// # Errors
    /// Those of unlinkat(2).
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.fd, name, AtFlags::empty())?)
    }

    /// Waits until the names are on stable storage.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub(super) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }
}

fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_link_is_neither_written_through_nor_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (target, path) = (dir.path().join("target"), dir.path().join("work"));
        fs::write(&target, "root's").unwrap();
        let (work, made) = CheckpointDir::open_or_create(&path).unwrap();
        assert!(made && work.names().unwrap().is_empty());
        symlink(&target, path.join("dump.log")).unwrap();
        assert_eq!(work.names().unwrap(), ["dump.log"]);
        assert_eq!(work.create("dump.log").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(work.open_file("dump.log").is_err());
        drop(work.replace("dump.log").unwrap());
        assert_eq!(fs::read_to_string(&target).unwrap(), "root's");
        assert!(!path.join("dump.log").is_symlink());
        for name in ["../target", "/etc/passwd", "a/../b"] {
            assert!(work.create(name).is_err() && work.open_file(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_directory_that_is_exchanged_gets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (dir.path().join("images"), dir.path().join("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        let (images, _) = CheckpointDir::open_or_create(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        symlink(&elsewhere, &path).unwrap();
        drop(images.create("pages-1.img").unwrap());
        assert!(fs::read_dir(&elsewhere).unwrap().next().is_none());
        assert!(CheckpointDir::open(&path).is_err(), "a link is no directory");
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        if !rustix::process::geteuid().is_root() {
            // Only root can give a directory away; any file of root's shows that others are refused to nobody.
            assert!(is_trusted(0) && !is_trusted(u32::MAX - 1));
            return;
        }
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        let refused = CheckpointDir::open(dir.path());
        assert!(matches!(refused, Err(CheckpointError::Owner { owner: 65534, .. })), "{refused:?}");
    }
}
