//! The cache's directory: finished disks, the index by which they are found, and how files are published
//! atomically.
//!
//! ```text
//! KEY.ext4         a disk; a shared flock(2) on it means "in use"
//! KEY.json         what it is; written last, removed first: a disk without it is not finished
//! index/IDENTITY   the key of a source that was seen before
//! locks/NAME       exists while a build runs
//! writable/        blank writable layers, in the same form
//! ```
//! Everything is written to an unnamed file, which gets its name when it is complete. So a killed process
//! leaves at worst a disk without its metadata, which [`Store::sweep`] removes.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_base::fs::{FileError, create_private_dirs, if_exists, lock_shared, remove_if_exists, try_lock};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, linkat, open, utimensat},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{RootdiskError, lock::is_at};

pub(crate) const DISK: &str = "ext4";
const METADATA: &str = "json";
/// Version of [`DiskMetadata`]; disks with another one are built again.
const VERSION: u32 = 1;
const METADATA_MAX: u64 = 64 << 10;
/// Bytes at a disk's start that its seal covers.
const SEALED: usize = 8192;

/// The description of a finished disk, stored as JSON next to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMetadata {
    /// The version of this description; disks with another one are built again.
    pub version: u32,
    /// The apparent size, bytes; most of it are holes.
    pub size: u64,
    /// Seconds since 1970.
    pub created: u64,
    /// What the disk was made of, for people.
    pub source: String,
    /// The number of files on the disk.
    pub files: u64,
    /// Bytes of the regular files' content.
    pub content: u64,
    /// The version of mke2fs that made the disk.
    pub mke2fs: String,
    /// Digest of the walk; see [`super::tree::SourceTree::shape`].
    pub(crate) shape: String,
    seal: Seal,
}

/// Properties that must not have changed since the disk was finished; checked at each use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Seal {
    mtime: i64,
    mtime_nsec: i64,
    start: String,
}

/// A directory of disks.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pub(crate) dir: PathBuf,
}

/// A finished disk, open for reading and locked as in use.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: File,
    pub(crate) metadata: DiskMetadata,
}

impl DiskMetadata {
    pub(crate) fn new(size: u64, source: String, shape: String, mke2fs: &str) -> Self {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (files, content, seal) = (0, 0, Seal::default());
        Self {
            version: VERSION,
            size,
            created,
            source,
            files,
            content,
            mke2fs: mke2fs.to_owned(),
            shape,
            seal,
        }
    }
}

impl Store {
    /// Opens the directory, which is made for root only if it is missing.
    pub(super) fn open(dir: &Path) -> Result<Self, RootdiskError> {
        create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Makes a directory below that of the store.
    pub(super) fn subdir(&self, name: &str) -> Result<Self, RootdiskError> {
        Self::open(&self.dir.join(name))
    }

    pub(crate) fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.dir.join(format!("{name}.{extension}"))
    }

    /// Makes an unnamed file in the directory, for reading and writing.
    pub(crate) fn unnamed(&self) -> Result<File, RootdiskError> {
        Ok(unnamed(&self.dir).map_err(FileError::at("make a file in", &self.dir))?)
    }

    /// Opens the finished disk of that name and locks it as in use. None if there is no such disk, or if it
    /// was damaged since: that is logged, and the next [`Store::publish`] replaces it.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Opened>, RootdiskError> {
        match self.check(name)? {
            Ok(opened) => {
                let used = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
                let kept = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
                let times = Timestamps { last_access: kept, last_modification: used };
                let path = self.path(name, METADATA);
                if let Err(error) = utimensat(CWD, &path, &times, AtFlags::empty()) {
                    tracing::warn!(path = %path.display(), "cannot note that a root disk is used: {error}");
                }
                Ok(Some(opened))
            }
            Err(UnusableDisk::Absent) => Ok(None),
            Err(unusable) => {
                tracing::warn!(disk = %self.path(name, DISK).display(), "not used: {unusable}");
                Ok(None)
            }
        }
    }

    /// Like [`Store::get`], but returns why a disk cannot be used, and does not record the use.
    pub(super) fn check(&self, name: &str) -> Result<Result<Opened, UnusableDisk>, RootdiskError> {
        let disk = self.path(name, DISK);
        let Some(file) = if_exists(File::open(&disk)).map_err(FileError::at("open", &disk))? else {
            return Ok(Err(UnusableDisk::Absent));
        };
        let failed = |error: io::Error| FileError::new("read", &disk, error);
        // A caller that removes the disk holds the lock only briefly.
        lock_shared(&file).map_err(failed)?;
        if !is_at(&file, &disk).map_err(failed)? {
            return Ok(Err(UnusableDisk::Absent));
        }
        let Some(metadata) = self.metadata(name)? else {
            return Ok(Err(UnusableDisk::Unfinished));
        };
        let found = file.metadata().map_err(failed)?;
        if found.len() != metadata.size {
            return Ok(Err(UnusableDisk::Size { found: found.len(), expected: metadata.size }));
        }
        if seal(&file).map_err(failed)? != metadata.seal {
            return Ok(Err(UnusableDisk::Seal));
        }
        Ok(Ok(Opened { file, metadata }))
    }

    /// The metadata, if it is there and can be understood.
    pub(super) fn metadata(&self, name: &str) -> Result<Option<DiskMetadata>, RootdiskError> {
        let path = self.path(name, METADATA);
        let Some(text) = if_exists(read(&path)).map_err(FileError::at("read", &path))? else {
            return Ok(None);
        };
        let version =
            serde_json::from_slice::<serde_json::Value>(&text).ok().and_then(|v| v["version"].as_u64());
        if version != Some(VERSION.into()) {
            return Ok(None);
        }
        Ok(serde_json::from_slice(&text).ok())
    }

    /// When the disk was used last.
    pub(super) fn used(&self, name: &str) -> Option<SystemTime> {
        fs::metadata(self.path(name, METADATA)).and_then(|metadata| metadata.modified()).ok()
    }

    /// Writes an unnamed disk to stable storage and gives it its name. An unfinished or damaged disk of that
    /// name is replaced.
    pub(crate) fn publish(
        &self,
        name: &str,
        disk: &File,
        mut metadata: DiskMetadata,
    ) -> Result<Opened, RootdiskError> {
        let path = self.path(name, DISK);
        let failed = |error: io::Error| FileError::new("publish", &path, error);
        disk.set_permissions(fs::Permissions::from_mode(0o400)).map_err(failed)?;
        disk.sync_all().map_err(FileError::at("write", &path))?;
        // From here on the disk is in use, so that no sweep removes it before its metadata is there.
        lock_shared(disk).map_err(failed)?;
        metadata.seal = seal(disk).map_err(failed)?;
        self.remove_file(&self.path(name, METADATA))?;
        name_file(disk, &path).map_err(failed)?;
        let text = serde_json::to_vec_pretty(&metadata).map_err(|error| failed(error.into()))?;
        self.write(&self.path(name, METADATA), &text)?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        let file = File::open(&path).map_err(failed)?;
        lock_shared(&file).map_err(failed)?;
        // Not when `disk` is closed: a process that is being started has a copy of it until it executes its program.
        disk.unlock().map_err(failed)?;
        Ok(Opened { file, metadata })
    }

    /// Makes or replaces a small file.
    pub(super) fn write(&self, path: &Path, text: &[u8]) -> Result<(), RootdiskError> {
        let mut file = self.unnamed()?;
        let written = file.write_all(text).and_then(|()| name_file(&file, path));
        Ok(written.map_err(FileError::at("write", path))?)
    }

    /// Removes a disk unless it is in use; false if it is.
    pub(super) fn remove(&self, name: &str) -> Result<bool, RootdiskError> {
        let path = self.path(name, DISK);
        let Some(file) = if_exists(File::open(&path)).map_err(FileError::at("open", &path))? else {
            return Ok(true);
        };
        if !try_lock(&file).map_err(FileError::at("lock", &path))? {
            return Ok(false);
        }
        // Callers that wait for the lock will see that the path is gone.
        self.remove_file(&self.path(name, METADATA))?;
        self.remove_file(&path)?;
        Ok(true)
    }

    /// Removes the metadata of a disk, so that the disk is not used any more.
    pub(super) fn unmark(&self, name: &str) -> Result<(), RootdiskError> {
        self.remove_file(&self.path(name, METADATA))
    }

    /// Names of all disks, finished or not, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, RootdiskError> {
        let failed = |error: io::Error| FileError::new("list", &self.dir, error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = PathBuf::from(entry.map_err(failed)?.file_name());
            if path.extension().is_some_and(|extension| extension == DISK) {
                names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Removes disks whose build was killed.
    pub(crate) fn sweep(&self) -> Result<(), RootdiskError> {
        for name in self.names()? {
            if !self.path(&name, METADATA).exists() && self.remove(&name)? {
                tracing::info!(name, "removed an unfinished disk");
            }
        }
        Ok(())
    }

    pub(super) fn remove_file(&self, path: &Path) -> Result<(), RootdiskError> {
        remove_if_exists(path).map_err(FileError::at("remove", path))?;
        Ok(())
    }
}

/// Why a disk is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnusableDisk {
    /// There is no file of this name.
    #[error("there is no such disk")]
    Absent,
    /// The build has not ended, or another version of machinen made the disk.
    #[error("it was not finished, or its metadata cannot be understood")]
    Unfinished,
    /// The file was truncated or extended.
    #[error("it has {found} bytes instead of {expected}")]
    Size {
        /// The size of the file, bytes.
        found: u64,
        /// The size when the disk was finished, bytes.
        expected: u64,
    },
    /// The time of the last change or the first blocks differ.
    #[error("it was written to after it was finished")]
    Seal,
    /// The files on the disk have another digest than the key.
    #[error("its content is not what it was")]
    Content,
    /// The file system on the disk cannot be read, for this reason.
    #[error("{0}")]
    Damaged(String),
}

fn seal(disk: &File) -> io::Result<Seal> {
    let metadata = disk.metadata()?;
    let mut start = vec![0; SEALED.min(metadata.len() as usize)];
    disk.read_exact_at(&mut start, 0)?;
    let start = super::key::RootdiskKey::new(Sha256::digest(&start).into()).to_string();
    Ok(Seal { mtime: metadata.mtime(), mtime_nsec: metadata.mtime_nsec(), start })
}

/// Reads at most [`METADATA_MAX`] bytes. A longer file is not valid anyway.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(File::open(path)?, METADATA_MAX), &mut text)?;
    Ok(text)
}

/// Makes an unnamed file in a directory, for reading and writing.
pub(crate) fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => Err(io::Error::other(
            "its file system cannot have files without a name (O_TMPFILE); use ext4, XFS or Btrfs",
        )),
        Err(error) => Err(error.into()),
    }
}

/// Gives a file that was made by [`unnamed`] a name, and replaces the file that has this name.
fn name_file(file: &File, path: &Path) -> io::Result<()> {
    loop {
        match name_new_file(file, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                remove_if_exists(path)?;
            }
            result => return result,
        }
    }
}

/// Gives a file that was made by [`unnamed`] a name that nothing has yet.
pub(crate) fn name_new_file(file: &File, path: &Path) -> io::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}
