//! Users without an account, one for each child process that must not reach another child.
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
    RUN_DIR,
    fs::{FileError, create_private_dirs, if_exists, lock, remove_if_exists, try_lock},
};

/// The first number. No user database reaches it: login.defs(5) and systemd assign smaller ones.
const FIRST: u32 = 0x7000_0000;
/// The number of numbers, a power of two.
const NUMBERS: u32 = 1 << 24;

/// A user that no other process of this host runs as, until this is dropped.
#[derive(Debug)]
pub struct ReservedUser {
    number: u32,
    path: PathBuf,
    _lock: File,
}

impl ReservedUser {
    /// Reserves a user on this host.
    ///
    /// # Errors
    /// The directory of reservations cannot be written.
    pub fn reserve() -> Result<Self, FileError> {
        Self::reserve_in(&Path::new(RUN_DIR).join("users"))
    }

    fn reserve_in(dir: &Path) -> Result<Self, FileError> {
        create_private_dirs(dir).map_err(FileError::at("make the directory", dir))?;
        let guard = File::open(dir).map_err(FileError::at("open", dir))?;
        // One process at a time looks for a free number.
        lock(&guard).map_err(FileError::at("lock", dir))?;
        for number in numbers(seed()) {
            let path = dir.join(number.to_string());
            let taken = take(&path).map_err(FileError::at("reserve", &path))?;
            if let Some(lock) = taken {
                return Ok(Self { number, path, _lock: lock });
            }
        }
        Err(FileError::new("find a free user in", dir, io::ErrorKind::StorageFull))
    }

    /// Removes the reservations of processes that were killed.
    ///
    /// # Errors
    /// The directory of reservations cannot be read, or a file in it cannot be removed.
    pub fn sweep() -> Result<(), FileError> {
        Self::sweep_in(&Path::new(RUN_DIR).join("users"))
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
        if let Err(error) = remove_if_exists(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot release a user: {error}");
        }
    }
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

fn numbers(seed: u32) -> impl Iterator<Item = u32> {
    let start = seed.wrapping_mul(0x9e37_79b1);
    (0..NUMBERS).map(move |step| FIRST + (start.wrapping_add(step) & (NUMBERS - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_reservations_of_killed_processes_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        ReservedUser::sweep_in(&dir.path().join("missing")).unwrap();
        let held = ReservedUser::reserve_in(dir.path()).unwrap();
        fs::write(dir.path().join("7"), "").unwrap();
        ReservedUser::sweep_in(dir.path()).unwrap();
        assert!(held.path.exists() && !dir.path().join("7").exists());
    }

    #[test]
    fn every_user_is_reserved_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = ReservedUser::reserve_in(dir.path()).unwrap();
        let second = ReservedUser::reserve_in(dir.path()).unwrap();
        assert_ne!(first.number, second.number);
        assert_eq!(first.run_as(vec![7]).groups, [7]);
        let number = first.number;
        drop(first);
        assert_eq!(ReservedUser::reserve_in(dir.path()).unwrap().number, number);
        drop(second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_user_of_a_killed_process_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let number = numbers(seed()).next().unwrap();
        File::create(dir.path().join(number.to_string())).unwrap();
        assert_eq!(ReservedUser::reserve_in(dir.path()).unwrap().number, number);
    }
}
