//! Locks by name, between threads and processes. A caller waits until the current holder releases the lock or
//! dies.
//!
//! A lock is a flock(2) on a file that exists only while the lock is held or waited for. After a kill an
//! empty file remains, which the next holder removes.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::fs::{if_exists, lock_within, try_lock};

/// How long the holder of a lock may take, which builds a disk.
const LONGEST_BUILD: Duration = Duration::from_secs(30 * 60);

/// A held lock. Dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Acquires a lock. If another caller holds it, calls `waiting` once and waits.
    pub(crate) fn acquire(path: &Path, mut waiting: impl FnMut()) -> io::Result<Self> {
        let mut reported = false;
        loop {
            let file = open(path)?;
            if !try_lock(&file)? {
                if !std::mem::replace(&mut reported, true) {
                    waiting();
                }
                lock_within(&file, LONGEST_BUILD)?;
            }
            // The previous holder may have removed the file meanwhile. Later callers lock another one.
            if is_at(&file, path)? {
                return Ok(Self { path: path.to_owned(), _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "cannot remove a lock file: {error}");
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// Whether the open file is the one that the path names now.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    let named = if_exists(fs::symlink_metadata(path))?;
    Ok(named.is_some_and(|named| (open.dev(), open.ino()) == (named.dev(), named.ino())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let lock = Lock::acquire(&path, || ()).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_a_killed_holder_left_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(&path, "").unwrap();
        let lock = Lock::acquire(&path, || panic!("the lock is free")).unwrap();
        let (sender, waits) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let path = &path;
            let second = scope.spawn(move || Lock::acquire(path, || sender.send(()).unwrap()).map(drop));
            waits.recv().unwrap();
            drop(lock);
            second.join().unwrap().unwrap();
        });
    }
}
