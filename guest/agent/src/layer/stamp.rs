//! A record of an upper directory before the container's command runs. If the directory is the same at the
//! end, nothing has to be exported: the end of most short-lived containers then costs a look at a few
//! directories.
//!
//! Mount points that the image lacks exist by then. They need no export: the next start makes them again.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// A directory with this many entries or more gets no stamp.
const MOST: usize = 64;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Vec<StampedFile>);

/// Attributes that every change of a file or directory changes.
#[derive(Debug, PartialEq, Eq)]
struct StampedFile {
    path: PathBuf,
    inode: u64,
    ctime: (i64, i64),
}

impl Stamp {
    /// None when there are too many entries, or one cannot be examined: the directory then counts as changed.
    pub(crate) fn take(upper: &Path) -> Option<Self> {
        Self::walk(upper).ok().flatten()
    }

    fn walk(upper: &Path) -> io::Result<Option<Self>> {
        let mut entries: Vec<StampedFile> = Vec::new();
        let mut pending = vec![upper.to_owned()];
        while let Some(path) = pending.pop() {
            let status = fs::symlink_metadata(&path)?;
            if status.is_dir() {
                for item in fs::read_dir(&path)? {
                    pending.push(item?.path());
                    if entries.len() + pending.len() >= MOST {
                        return Ok(None);
                    }
                }
            }
            entries.push(StampedFile {
                path,
                inode: status.ino(),
                ctime: (status.ctime(), status.ctime_nsec()),
            });
        }
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(Some(Self(entries)))
    }

    /// Whether `upper` is unchanged. False in case of doubt.
    pub(crate) fn matches(&self, upper: &Path) -> bool {
        Self::take(upper).is_some_and(|now| now == *self)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt, time::SystemTime};

    use super::*;

    /// Returns when the kernel's clock for files has advanced, which it observes only by changing a file.
    fn tick(dir: &Path) {
        let probe = dir.with_extension("probe");
        let now = || {
            fs::write(&probe, "").unwrap();
            fs::metadata(&probe).unwrap().modified().unwrap()
        };
        let start: SystemTime = now();
        while now() == start {}
        fs::remove_file(&probe).unwrap();
    }

    fn changed(change: impl FnOnce(&Path)) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("upper");
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::write(upper.join("etc/file"), "x").unwrap();
        let stamp = Stamp::take(&upper).unwrap();
        tick(&upper);
        change(&upper);
        !stamp.matches(&upper)
    }

    #[test]
    fn every_change_is_seen() {
        assert!(!changed(|_| ()));
        assert!(!changed(|upper| drop(fs::read(upper.join("etc/file")).unwrap())));
        assert!(changed(|upper| fs::write(upper.join("new"), "").unwrap()));
        assert!(changed(|upper| fs::write(upper.join("etc/file"), "y").unwrap()));
        assert!(changed(|upper| fs::set_permissions(upper, Permissions::from_mode(0o700)).unwrap()));
        assert!(changed(|upper| fs::remove_file(upper.join("etc/file")).unwrap()));
        assert!(changed(|upper| {
            fs::write(upper.join("new"), "").unwrap();
            fs::remove_file(upper.join("new")).unwrap();
        }));
    }

    #[test]
    fn many_entries_are_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..MOST {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        assert_eq!(Stamp::take(dir.path()), None);
    }
}
