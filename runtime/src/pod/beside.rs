//! Where the writable disk of a whole root file system lives, as the native snapshotter has them: there is nothing beside
//! such a snapshot that goes with it, and what is in it is the container's.
//!
//! ```text
//!   <rootdisk.dir>/layers/<digest of the path>.ext4     attribute user.machinen.layer: identity, base key, path
//! ```
//! A disk there is one that was not exported. It belongs to the directory of that path only as long as that has the same
//! identity: another one of the same name is another container's. Whoever makes a disk removes those that belong to nothing
//! any more. All of this happens under a lock on the directory.

use std::{
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FlockOperation, StatxFlags, XattrFlags, fgetxattr, flock, fsetxattr, statx},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use crate::rootdisk::RootdiskKey;

const ATTRIBUTE: &str = "user.machinen.layer";
/// Longest value, bytes: a path and some numbers.
const ATTRIBUTE_MAX: usize = 8 << 10;

/// What is known of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Label {
    /// Device, inode and time of birth of the directory that the disk's writes are for.
    identity: String,
    /// The base disk that the writes are over; not known until it was found or built.
    base: Option<RootdiskKey>,
    path: PathBuf,
}

/// The directory of such disks, locked.
#[derive(Debug)]
pub(super) struct Disks {
    dir: PathBuf,
    _lock: File,
}

/// Where the disk for `root` is, whether it exists or not.
pub(super) fn path(cache: &Path, root: &Path) -> PathBuf {
    let digest = RootdiskKey::new(Sha256::digest(root.as_os_str().as_bytes()).into());
    dir(cache).join(format!("{digest}.ext4"))
}

fn dir(cache: &Path) -> PathBuf {
    cache.join("layers")
}

impl Disks {
    /// Makes the directory if there is none, waits for the lock, and removes the disks that belong to nothing.
    pub(super) fn lock(cache: &Path) -> io::Result<Self> {
        let dir = dir(cache);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let lock = File::open(&dir)?;
        while let Err(errno) = flock(&lock, FlockOperation::LockExclusive) {
            if errno != Errno::INTR {
                return Err(errno.into());
            }
        }
        let disks = Self { dir, _lock: lock };
        disks.sweep()?;
        Ok(disks)
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let disk = File::open(&path)?;
            let belongs = Label::of(&disk)?.is_some_and(|label| label.is_of(&label.path));
            // One that is in use may be without its label for a moment, when its directory is exchanged.
            if !belongs && flock(&disk, FlockOperation::NonBlockingLockExclusive).is_ok() {
                tracing::info!(path = %path.display(), "removed a disk whose snapshot is gone");
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Notes that the disk's writes are for `root` as it is now, over the base disk of that key.
pub(super) fn label(disk: &File, root: &Path, base: Option<RootdiskKey>) -> io::Result<()> {
    let label = Label { identity: identity(root)?, base, path: root.to_owned() };
    Ok(fsetxattr(disk, ATTRIBUTE, &label.encode(), XattrFlags::empty())?)
}

/// Says that the disk is in use as long as this description of it is open anywhere, in a VM too.
pub(super) fn mark_used(disk: &File) -> io::Result<()> {
    Ok(flock(disk, FlockOperation::LockShared)?)
}

/// [`label`] for a disk by its path; keeps the base that was noted before.
pub(super) fn relabel(disk: &Path, root: &Path) -> io::Result<()> {
    let disk = File::open(disk)?;
    let base = Label::of(&disk)?.and_then(|label| label.base);
    label(&disk, root, base)
}

/// The base disk under the writes of a disk that an earlier container on `root` left.
pub(super) fn base_of(disk: &Path, root: &Path) -> io::Result<Option<RootdiskKey>> {
    match File::open(disk) {
        Ok(disk) => Ok(Label::of(&disk)?.filter(|label| label.is_of(root)).and_then(|label| label.base)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
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
    fn a_disk_goes_with_its_directory() {
        // Not a tmpfs, which may know no such attributes.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let (cache, root) = (dir.path().join("cache"), dir.path().join("root"));
        fs::create_dir(&root).unwrap();
        let disk = path(&cache, &root);
        let key = RootdiskKey::new([7; 32]);
        {
            let _disks = Disks::lock(&cache).unwrap();
            let file = File::create(&disk).unwrap();
            label(&file, &root, None).unwrap();
            label(&file, &root, Some(key)).unwrap();
        }
        drop(Disks::lock(&cache).unwrap());
        assert_eq!(base_of(&disk, &root).unwrap(), Some(key));
        // Exchanged, as by a pause.
        fs::rename(&root, dir.path().join("old")).unwrap();
        fs::create_dir(&root).unwrap();
        relabel(&disk, &root).unwrap();
        drop(Disks::lock(&cache).unwrap());
        assert_eq!(base_of(&disk, &root).unwrap(), Some(key));
        // Another directory of the same name is another container's.
        fs::rename(&root, dir.path().join("older")).unwrap();
        fs::create_dir(&root).unwrap();
        drop(Disks::lock(&cache).unwrap());
        assert!(!disk.exists());
        assert_eq!(base_of(&disk, &root).unwrap(), None);
        // One that is in use stays.
        let used = File::create(&disk).unwrap();
        mark_used(&used).unwrap();
        drop(Disks::lock(&cache).unwrap());
        assert!(disk.exists());
        drop(used);
        // One whose maker was killed before it said what it is for.
        drop(Disks::lock(&cache).unwrap());
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
