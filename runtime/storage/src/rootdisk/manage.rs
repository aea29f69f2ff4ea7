//! Lists, verifies and removes the disks of the cache.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use machinen_base::fs::FileError;
use rustix::fs::{major, minor};

use super::{
    RootdiskCache, RootdiskError, ext4,
    key::RootdiskKey,
    store::{self, DISK, DiskMetadata, UnusableDisk},
};

/// A disk in the cache.
#[derive(Debug, Clone)]
pub struct ListedDisk {
    /// The name of the disk: a digest of its content.
    pub key: RootdiskKey,
    /// Path of the disk in the cache.
    pub path: PathBuf,
    /// The apparent size, bytes.
    pub size: u64,
    /// The allocated size, bytes.
    pub allocated: u64,
    /// Whether the disk can be used.
    pub state: DiskState,
    /// Processes that use the disk, each once for every use.
    pub users: Vec<u32>,
    /// When the disk was used last; None if it is not finished.
    pub used: Option<SystemTime>,
    /// The description of the disk; None if it is missing or cannot be understood.
    pub metadata: Option<DiskMetadata>,
}

/// Whether a disk can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskState {
    /// The disk can be used.
    Ready,
    /// A build is running, or a build was killed.
    Unfinished,
    /// The disk was finished, and cannot be used any more for this reason.
    Damaged(UnusableDisk),
}

/// Which unused disks are removed: those that meet both conditions, and all that are not ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Not used for at least this time.
    pub older_than: Option<Duration>,
    /// While the cache takes more than this many bytes, the least recently used ones first.
    pub keep_bytes: Option<u64>,
    /// Only report what would be removed.
    pub dry_run: bool,
}

/// What [`RootdiskCache::prune`] did.
#[derive(Debug, Clone, Default)]
pub struct PrunedDisks {
    /// Disks that were removed, or would be removed without [`PruneOptions::dry_run`].
    pub removed: Vec<ListedDisk>,
    /// Disks that meet the conditions, but are in use.
    pub in_use: Vec<ListedDisk>,
}

impl RootdiskCache {
    /// All disks, the most recently used first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<ListedDisk>, RootdiskError> {
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        let mut found = Vec::new();
        for name in self.store.names()? {
            let Ok(key) = name.parse::<RootdiskKey>() else { continue };
            let path = self.store.path(&name, DISK);
            // The disk was removed after the directory was read.
            let Ok(file) = fs::metadata(&path) else { continue };
            let users = lock_holders(&locks, file.dev(), file.ino());
            let state = match self.store.check(&name)? {
                Ok(opened) => {
                    // Not when it is closed: a process that is being started has a copy until it executes its program.
                    opened.file.unlock().map_err(FileError::at("unlock", &path))?;
                    DiskState::Ready
                }
                Err(UnusableDisk::Absent) => continue,
                Err(UnusableDisk::Unfinished) => DiskState::Unfinished,
                Err(damage) => DiskState::Damaged(damage),
            };
            let (used, metadata) = (self.store.used(&name), self.store.metadata(&name)?);
            let (size, allocated) = (file.len(), file.blocks() * 512);
            found.push(ListedDisk { key, path, size, allocated, state, users, used, metadata });
        }
        found.sort_by_key(|listed| std::cmp::Reverse(listed.used));
        Ok(found)
    }

    /// Reads a disk and compares all of it with its key. A damaged disk is not used any more: the next start
    /// that needs it builds it again.
    ///
    /// # Errors
    /// The disk cannot be opened.
    pub fn verify(&self, key: RootdiskKey) -> Result<Result<(), UnusableDisk>, RootdiskError> {
        let name = key.to_string();
        let opened = match self.store.check(&name)? {
            Ok(opened) => opened,
            Err(unusable) => return Ok(Err(unusable)),
        };
        let damage = match ext4::manifest(&opened.file) {
            Ok(found) if found == key => return Ok(Ok(())),
            Ok(_) => UnusableDisk::Content,
            Err(error) => UnusableDisk::Damaged(machinen_base::error::chain(&error)),
        };
        self.store.unmark(&name)?;
        Ok(Err(damage))
    }

    /// Removes unused disks.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn prune(&self, what: &PruneOptions) -> Result<PrunedDisks, RootdiskError> {
        let listed = self.list()?;
        let mut total: u64 = listed.iter().map(|disk| disk.allocated).sum();
        let mut pruned = PrunedDisks::default();
        let now = SystemTime::now();
        for disk in listed.into_iter().rev() {
            let age = disk.used.and_then(|used| now.duration_since(used).ok()).unwrap_or_default();
            let old = what.older_than.is_none_or(|limit| age >= limit);
            let too_much = what.keep_bytes.is_none_or(|budget| total > budget);
            if disk.state == DiskState::Ready && !(old && too_much) {
                continue;
            }
            let free = if what.dry_run {
                disk.users.is_empty()
            } else {
                self.store.remove(&disk.key.to_string())?
            };
            if free {
                total -= disk.allocated;
                pruned.removed.push(disk);
            } else {
                pruned.in_use.push(disk);
            }
        }
        if !what.dry_run {
            self.forget_removed()?;
            self.blanks.sweep()?;
        }
        Ok(pruned)
    }

    /// Removes index entries whose disk does not exist.
    fn forget_removed(&self) -> Result<(), RootdiskError> {
        let failed = |error: io::Error| FileError::new("list", &self.index.dir, error);
        for entry in fs::read_dir(&self.index.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let key = store::read(&path)
                .ok()
                .and_then(|text| String::from_utf8(text).ok()?.parse::<RootdiskKey>().ok());
            if key.is_none_or(|key| !self.store.path(&key.to_string(), DISK).exists()) {
                self.index.remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// Processes that hold a flock(2) on a file, from the text of /proc/locks (proc(5)).
fn lock_holders(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let file = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let held = locks.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // A line with an arrow is about a process that waits for the lock.
        match fields[..] {
            [_, "FLOCK", _, _, pid, place, ..] if place == file => pid.parse().ok(),
            _ => None,
        }
    });
    held.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_held_flocks_of_the_file_count() {
        let locks = "1: FLOCK  ADVISORY  READ 4711 fe:00:123 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 5 fe:00:123 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 6 fe:00:123 0 EOF\n\
                     3: FLOCK  ADVISORY  READ 7 fe:01:123 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 8 fe:00:1234 0 EOF\n";
        assert_eq!(lock_holders(locks, rustix::fs::makedev(0xfe, 0), 123), [4711]);
    }
}
