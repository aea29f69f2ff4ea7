//! Users without an account, one for each child process that must not reach another child.
//!
//! The numbers are those that no user database and no container has. In the user namespace of an ordinary user, they are the
//! last that it maps (subuid(5)); if it maps one user only, that is the user of every child.
//!
//! A reserved user is a locked file in a directory that all processes of machinen use, named by the number of the user.
//! A file that is not locked belongs to a process that was killed, and its user is free.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::RunAs;
use crate::{
    fs::{FileError, create_private_dirs, if_exists, lock, remove_if_exists, try_lock},
    owner,
};

/// The first number. No user database reaches it: login.defs(5) and systemd assign smaller ones.
const FIRST: u32 = 0x7000_0000;
/// The number of numbers.
const NUMBERS: u32 = 1 << 24;

/// Most numbers that are taken from a user's range.
const OF_RANGE: u32 = 4096;
/// The last numbers of a range are left to containers: images use some of them, such as 65534 for the user `nobody`.
const LAST: u32 = 1024;

/// A user that no other process of this host runs as, until this is dropped. If there is only one user, it is that one.
#[derive(Debug)]
pub struct ReservedUser {
    number: u32,
    reservation: Option<(PathBuf, File)>,
}

/// The numbers from which users are reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
}

impl ReservedUser {
    /// Reserves a user on this host.
    ///
    /// # Errors
    /// The directory of reservations cannot be written.
    pub fn reserve() -> Result<Self, FileError> {
        match Range::of_this_process()? {
            Some(range) => Self::reserve_in(&dir(), range),
            None => Ok(Self { number: 0, reservation: None }),
        }
    }

    fn reserve_in(dir: &Path, range: Range) -> Result<Self, FileError> {
        create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
        let guard = File::open(dir).map_err(FileError::at("open", dir))?;
        // One process at a time looks for a free number.
        lock(&guard).map_err(FileError::at("lock", dir))?;
        for number in range.numbers(seed()) {
            let path = dir.join(number.to_string());
            let taken = take(&path).map_err(FileError::at("reserve", &path))?;
            if let Some(lock) = taken {
                return Ok(Self { number, reservation: Some((path, lock)) });
            }
        }
        Err(FileError::new("find a free user in", dir, io::ErrorKind::StorageFull))
    }

    /// Removes the reservations of processes that were killed.
    ///
    /// # Errors
    /// The directory of reservations cannot be read, or a file in it cannot be removed.
    pub fn sweep() -> Result<(), FileError> {
        Self::sweep_in(&dir())
    }

    fn sweep_in(dir: &Path) -> Result<(), FileError> {
        let Some(guard) = if_exists(File::open(dir)).map_err(FileError::at("open", dir))? else {
            return Ok(());
        };
        lock(&guard).map_err(FileError::at("lock", dir))?;
        for entry in fs::read_dir(dir).map_err(FileError::at("read", dir))? {
            let path = entry.map_err(FileError::at("read", dir))?.path();
            // The lock is held until the file is removed.
            if let Some(_free) = take(&path).map_err(FileError::at("lock", &path))? {
                remove_if_exists(&path).map_err(FileError::at("remove", &path))?;
            }
        }
        Ok(())
    }

    /// This user, and the group of the same number, in these other groups.
    pub fn run_as(&self, groups: Vec<u32>) -> RunAs {
        RunAs { uid: self.number, gid: self.number, groups }
    }
}

impl Drop for ReservedUser {
    fn drop(&mut self) {
        let Some((path, _lock)) = &self.reservation else { return };
        if let Err(error) = remove_if_exists(path) {
            tracing::warn!(path = %path.display(), "cannot release a user: {error}");
        }
    }
}

impl Range {
    const OF_HOST: Self = Self { first: FIRST, count: NUMBERS };

    /// None: the user namespace maps one user only.
    fn of_this_process() -> Result<Option<Self>, FileError> {
        if owner::user().is_none() {
            return Ok(Some(Self::OF_HOST));
        }
        let read = |path| fs::read_to_string(path).map_err(FileError::at("read", path));
        Ok(Self::of_maps(&read("/proc/self/uid_map")?, &read("/proc/self/gid_map")?))
    }

    /// The numbers that both maps have, in the format of user_namespaces(7): the end of the longest range.
    fn of_maps(uids: &str, gids: &str) -> Option<Self> {
        let (uids, gids) = (mapped(uids), mapped(gids));
        let pairs = uids.iter().flat_map(|uid| gids.iter().map(move |gid| (uid, gid)));
        // Number 0 is the user that this process works for.
        let common = pairs.map(|(uid, gid)| (uid.0.max(gid.0).max(1), uid.1.min(gid.1)));
        let (start, end) = common.max_by_key(|(start, end)| end.saturating_sub(*start))?;
        let length = end.checked_sub(start).filter(|length| *length > 0)?;
        let end = if length > OF_RANGE + LAST { end - LAST } else { end };
        // The first numbers of a short range are left to containers.
        let count = OF_RANGE.min(length.div_ceil(2));
        Some(Self { first: end - count, count })
    }

    fn numbers(self, seed: u32) -> impl Iterator<Item = u32> {
        let start = seed.wrapping_mul(0x9e37_79b1);
        (0..self.count).map(move |step| self.first + (start % self.count + step) % self.count)
    }
}

/// The first number of each range and the one behind it.
fn mapped(map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut numbers = line.split_ascii_whitespace().map(|word| word.parse::<u32>().ok());
        let (first, _, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some((first, first.saturating_add(count)))
    };
    map.lines().filter_map(range).collect()
}

fn dir() -> PathBuf {
    owner::run_dir().join("users")
}

/// The file if no other process has locked it.
fn take(path: &Path) -> io::Result<Option<File>> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    if !try_lock(&file)? {
        return Ok(None);
    }
    // The former holder may have removed the file meanwhile, and the next one would then lock another.
    let (open, named) = (file.metadata()?, if_exists(fs::symlink_metadata(path))?);
    let same = named.is_some_and(|named| (open.dev(), open.ino()) == (named.dev(), named.ino()));
    Ok(same.then_some(file))
}

/// Differs between processes, also between those with the same pid in different pid namespaces, which may have different
/// directories of reservations.
fn seed() -> u32 {
    let namespace = fs::metadata("/proc/self/ns/pid").map_or(0, |namespace| namespace.ino() as u32);
    std::process::id().wrapping_add(namespace.wrapping_mul(0x85eb_ca6b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reserve_in(dir: &Path) -> Result<ReservedUser, FileError> {
        ReservedUser::reserve_in(dir, Range::OF_HOST)
    }

    #[test]
    fn numbers_are_those_that_a_user_namespace_has() {
        let of = |uids: &str, gids: &str| Range::of_maps(uids, gids).map(|range| (range.first, range.count));
        let usual = "0 1001 1\n1 100000 65536\n";
        assert_eq!(of(usual, usual), Some((65537 - 1024 - 4096, 4096)));
        assert_eq!(of("0 1001 1\n1 100000 8\n", usual), Some((5, 4)));
        assert_eq!(of("0 1001 1\n1 100000 1\n", usual), Some((1, 1)));
        assert_eq!(of("0 1001 1\n", usual), None);
        assert_eq!(of("0 1001 1\n5 9 10\n", "0 1001 1\n20 9 10\n"), None);
        let all: Vec<_> = Range { first: 5, count: 4 }.numbers(u32::MAX).collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [5, 6, 7, 8], "{all:?}");
    }

    #[test]
    fn only_reservations_of_killed_processes_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        ReservedUser::sweep_in(&dir.path().join("missing")).unwrap();
        let held = reserve_in(dir.path()).unwrap();
        fs::write(dir.path().join("7"), "").unwrap();
        ReservedUser::sweep_in(dir.path()).unwrap();
        assert!(held.reservation.as_ref().unwrap().0.exists() && !dir.path().join("7").exists());
    }

    #[test]
    fn every_user_is_reserved_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = reserve_in(dir.path()).unwrap();
        let second = reserve_in(dir.path()).unwrap();
        assert_ne!(first.number, second.number);
        assert_eq!(first.run_as(vec![7]).groups, [7]);
        let number = first.number;
        drop(first);
        assert_eq!(reserve_in(dir.path()).unwrap().number, number);
        drop(second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_user_of_a_killed_process_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let number = Range::OF_HOST.numbers(seed()).next().unwrap();
        File::create(dir.path().join(number.to_string())).unwrap();
        assert_eq!(reserve_in(dir.path()).unwrap().number, number);
    }
}
