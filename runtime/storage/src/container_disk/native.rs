//! The writable disks of containers on a whole root file system, as the native snapshotter or a user provides it.
//! Everything in such a directory belongs to the container and nothing outside of it is removed with it, so
//! the disk is kept in a directory of machinen's.
//!
//! ```text
//!   <rootdisk.dir>/layers/<digest of the path>.ext4   attribute user.machinen.layer: identity, base key, path
//!                         <digest of the path>-1.ext4 of a second container at the same time, in a user's directory
//!                         <the same>.exported         names that were merged into a user's directory
//! ```
//! A disk exists there as long as its changes have not been exported. It belongs to the directory at that
//! path only while the directory has the recorded identity: a later directory of the same name belongs to
//! another container. A process that creates a disk first removes the disks whose directory is gone. All of
//! this happens under a lock on the directory of disks.

use std::{
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use machinen_base::fs::{
    FileError, create_private_dirs, if_exists, lock, lock_shared, remove_if_exists, try_lock,
};
use rustix::{
    fs::{AtFlags, CWD, StatxFlags, XattrFlags, fgetxattr, fsetxattr, statx},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use crate::rootdisk::RootdiskKey;

const ATTRIBUTE: &str = "user.machinen.layer";
/// Extension of the names of records.
const RECORD: &str = "exported";
/// Longest value, bytes: a path and some numbers.
const ATTRIBUTE_MAX: usize = 8 << 10;

/// The attribute of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Label {
    /// Device, inode and birth time of the directory that the disk's changes are for.
    identity: String,
    /// The base disk below the changes; None until it was found or built.
    base: Option<RootdiskKey>,
    path: PathBuf,
}

/// The locked directory of these disks.
#[derive(Debug)]
pub(super) struct NativeDisks {
    dir: PathBuf,
    _lock: File,
}

/// The path of the disk for `root`, whether the disk exists or not.
pub(super) fn path(cache: &Path, root: &Path) -> PathBuf {
    let digest = RootdiskKey::new(Sha256::digest(root.as_os_str().as_bytes()).into());
    dir(cache).join(format!("{digest}.ext4"))
}

/// The path of one of the disks for `root`, a directory that several containers may use at a time.
pub(super) fn numbered(cache: &Path, root: &Path, number: usize) -> PathBuf {
    let first = path(cache, root);
    match (number, first.file_stem().and_then(|stem| stem.to_str())) {
        (1.., Some(digest)) => first.with_file_name(format!("{digest}-{number}.ext4")),
        _ => first,
    }
}

/// The record of what has been merged from the disk, see [`layer::store`](crate::layer::store).
pub(super) fn record(disk: &Path) -> PathBuf {
    disk.with_extension(RECORD)
}

fn dir(cache: &Path) -> PathBuf {
    cache.join("layers")
}

impl NativeDisks {
    /// Creates the directory if it is missing, waits for the lock, and removes the disks that belong to no
    /// directory.
    pub(super) fn lock(cache: &Path) -> Result<Self, FileError> {
        let dir = dir(cache);
        create_private_dirs(&dir).map_err(FileError::at("make the directory", &dir))?;
        let locked = File::open(&dir).map_err(FileError::at("open", &dir))?;
        lock(&locked).map_err(FileError::at("lock", &dir))?;
        let disks = Self { dir, _lock: locked };
        disks.sweep().map_err(FileError::at("remove unused disks from", &disks.dir))?;
        Ok(disks)
    }

    /// The path of the first disk for `root` that no container uses: one that was left, or a new one.
    pub(super) fn unused(&self, cache: &Path, root: &Path) -> io::Result<PathBuf> {
        let mut number = 0;
        loop {
            let path = numbered(cache, root, number);
            match if_exists(File::open(&path))? {
                Some(disk) if !try_lock(&disk)? => number += 1,
                _ => return Ok(path),
            }
        }
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "ext4") {
                if !path.with_extension("ext4").exists() {
                    remove_if_exists(&path)?;
                }
                continue;
            }
            let disk = File::open(&path)?;
            let belongs = Label::of(&disk)?.is_some_and(|label| label.is_of(&label.path));
            // A disk in use may lack a valid label for a moment, while its directory is being exchanged.
            if !belongs && try_lock(&disk)? {
                tracing::info!(path = %path.display(), "removed a disk whose snapshot is gone");
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Records that the disk's changes are for the present directory `root`, on top of the base disk with that
/// key.
pub(super) fn label(disk: &File, root: &Path, base: Option<RootdiskKey>) -> io::Result<()> {
    let label = Label { identity: identity(root)?, base, path: root.to_owned() };
    Ok(fsetxattr(disk, ATTRIBUTE, &label.encode(), XattrFlags::empty())?)
}

/// Marks the disk as in use, for as long as this open file description exists in any process, including a VM.
pub(super) fn mark_in_use(disk: &File) -> io::Result<()> {
    lock_shared(disk)
}

/// Like [`label`], for a disk at a path; keeps the recorded base disk.
pub(super) fn relabel(disk: &Path, root: &Path) -> io::Result<()> {
    let disk = File::open(disk)?;
    let base = Label::of(&disk)?.and_then(|label| label.base);
    label(&disk, root, base)
}

/// The base disk below a disk that an earlier container on `root` has left.
pub(super) fn base_of(disk: &Path, root: &Path) -> io::Result<Option<RootdiskKey>> {
    let Some(disk) = if_exists(File::open(disk))? else { return Ok(None) };
    Ok(Label::of(&disk)?.filter(|label| label.is_of(root)).and_then(|label| label.base))
}

fn identity(root: &Path) -> io::Result<String> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = statx(CWD, root, AtFlags::SYMLINK_NOFOLLOW, mask)?;
    let born = stat.stx_btime;
    Ok(format!(
        "{}:{} {} {}.{:09}",
        stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, born.tv_sec, born.tv_nsec
    ))
}

impl Label {
    fn of(disk: &File) -> io::Result<Option<Self>> {
        let mut value = vec![0; ATTRIBUTE_MAX];
        match fgetxattr(disk, ATTRIBUTE, value.as_mut_slice()) {
            Ok(length) => Ok(Self::decode(&value[..length])),
            Err(Errno::NODATA) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn is_of(&self, root: &Path) -> bool {
        identity(root).is_ok_and(|now| now == self.identity)
    }

    fn encode(&self) -> Vec<u8> {
        let base = self.base.map_or_else(|| "-".to_owned(), |key| key.to_string());
        [self.identity.as_bytes(), b"\n", base.as_bytes(), b"\n", self.path.as_os_str().as_bytes()].concat()
    }

    fn decode(value: &[u8]) -> Option<Self> {
        let mut lines = value.splitn(3, |&byte| byte == b'\n');
        let identity = String::from_utf8(lines.next()?.to_vec()).ok()?;
        let base = match std::str::from_utf8(lines.next()?).ok()? {
            "-" => None,
            key => Some(key.parse().ok()?),
        };
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(lines.next()?));
        Some(Self { identity, base, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_removed_with_its_directory() {
        // A tmpfs may not support user attributes.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (cache, root) = (dir.path().join("cache"), dir.path().join("root"));
        fs::create_dir(&root).unwrap();
        let disk = path(&cache, &root);
        let key = RootdiskKey::new([7; 32]);
        {
            let _disks = NativeDisks::lock(&cache).unwrap();
            let file = File::create(&disk).unwrap();
            label(&file, &root, None).unwrap();
            label(&file, &root, Some(key)).unwrap();
        }
        drop(NativeDisks::lock(&cache).unwrap());
        assert_eq!(base_of(&disk, &root).unwrap(), Some(key));
        // The directory is exchanged, as by a pause.
        fs::rename(&root, dir.path().join("old")).unwrap();
        fs::create_dir(&root).unwrap();
        relabel(&disk, &root).unwrap();
        drop(NativeDisks::lock(&cache).unwrap());
        assert_eq!(base_of(&disk, &root).unwrap(), Some(key));
        // Another directory of the same name belongs to another container.
        fs::rename(&root, dir.path().join("older")).unwrap();
        fs::create_dir(&root).unwrap();
        drop(NativeDisks::lock(&cache).unwrap());
        assert!(!disk.exists());
        assert_eq!(base_of(&disk, &root).unwrap(), None);
        // A disk in use stays.
        let used = File::create(&disk).unwrap();
        mark_in_use(&used).unwrap();
        drop(NativeDisks::lock(&cache).unwrap());
        assert!(disk.exists());
        drop(used);
        // A disk whose creator was killed before it was labelled.
        drop(NativeDisks::lock(&cache).unwrap());
        assert!(!disk.exists());
    }

    #[test]
    fn labels_round_trip() {
        let label = Label { identity: "1:2 3 4.5".into(), base: None, path: "/a\nb".into() };
        assert_eq!(Label::decode(&label.encode()), Some(label.clone()));
        let label = Label { base: Some(RootdiskKey::new([1; 32])), ..label };
        assert_eq!(Label::decode(&label.encode()), Some(label));
        assert_eq!(Label::decode(b"nonsense"), None);
    }
}
