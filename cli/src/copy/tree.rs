//! Copies a tree of files, one of whose sides is not trusted.
//!
//! Every file is reached from the open directory that it is in, never through a link, and is checked after it was opened.
//! Links are copied as links. Devices, fifos and sockets are left out, because on the host a device would be the host's.
//! The number of files, their bytes and the depth are bounded, since a guest can make trees without end.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use glob::Pattern;
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
        fstat, futimens, mkdirat, openat, readlinkat, statat, symlinkat, unlinkat,
    },
    io::Errno,
};

use super::{CopyError, resolve::Place};

/// Files whose size the system reports as 0, as in /proc, are read up to this many bytes.
const UNKNOWN_SIZE: u64 = 16 << 20;
/// Most names of files that are left out and reported.
const MAX_REPORTED: usize = 100;

/// Which attributes a copy keeps, in addition to content, mode and modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopyOptions {
    /// Owner and group.
    pub(crate) owners: bool,
    /// setuid, setgid and sticky.
    pub(crate) special_bits: bool,
}

/// Bounds of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopyLimits {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
    /// Each level takes two descriptors.
    pub(crate) depth: usize,
}

impl CopyLimits {
    pub(crate) const DEFAULT: Self = Self { bytes: 64 << 30, entries: 2_000_000, depth: 256 };
}

/// A copy, and how much of its bounds is used.
#[derive(Debug)]
pub(crate) struct TreeCopy {
    excludes: Vec<Pattern>,
    options: CopyOptions,
    limits: CopyLimits,
    bytes: u64,
    entries: u64,
    left_out: Vec<String>,
}

impl TreeCopy {
    pub(crate) fn new(excludes: Vec<Pattern>, options: CopyOptions, limits: CopyLimits) -> Self {
        Self { excludes, options, limits, bytes: 0, entries: 0, left_out: Vec::new() }
    }

    /// The files that were not copied because of their type.
    pub(crate) fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Copies what is at `from` to `name` in the directory `into`.
    ///
    /// # Errors
    /// A file cannot be read or made, or a bound is reached.
    pub(crate) fn copy(&mut self, from: &Place, into: &OwnedFd, name: &OsStr) -> Result<(), CopyError> {
        self.entry(from.parent.as_fd(), &from.name, into.as_fd(), name, &mut CopyPath::new(&from.shown))
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        from_name: &OsStr,
        into: BorrowedFd<'_>,
        name: &OsStr,
        path: &mut CopyPath,
    ) -> Result<(), CopyError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(CopyError::TooMany { entries: self.limits.entries });
        }
        let stat = match statat(from, from_name, AtFlags::SYMLINK_NOFOLLOW) {
            // Removed since the directory was read.
            Err(Errno::NOENT) if path.depth() > 0 => return Ok(()),
            stat => stat.map_err(|errno| CopyError::at("look up", &path.shown, errno))?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(from, from_name, into, name, path),
            FileType::RegularFile => self.file(from, from_name, into, name, path),
            FileType::Symlink => self.link(from, from_name, &stat, (into, name), path),
            kind => {
                if self.left_out.len() < MAX_REPORTED {
                    self.left_out.push(format!("{} ({})", path.printable(), kind_name(kind)));
                }
                Ok(())
            }
        }
    }

    fn directory(
        &mut self,
        from: BorrowedFd<'_>,
        from_name: &OsStr,
        into: BorrowedFd<'_>,
        name: &OsStr,
        path: &mut CopyPath,
    ) -> Result<(), CopyError> {
        if path.depth() >= self.limits.depth {
            return Err(CopyError::TooDeep { path: path.shown.clone(), depth: self.limits.depth });
        }
        let shown = path.shown.clone();
        let failed = |action: &'static str| {
            let shown = &shown;
            move |errno| CopyError::at(action, shown, errno)
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let source = openat(from, from_name, flags, Mode::empty()).map_err(failed("open"))?;
        let stat = fstat(&source).map_err(failed("look up"))?;
        let is_new = match mkdirat(into, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(failed("make the copy of")(errno)),
        };
        let target = match openat(into, name, flags, Mode::empty()) {
            Ok(target) => target,
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(in_the_way(into, name, path)),
            Err(errno) => return Err(failed("open the copy of")(errno)),
        };
        for child in names(&source, &path.shown)? {
            path.push(&child);
            if !self.is_excluded(path) {
                self.entry(source.as_fd(), &child, target.as_fd(), &child, path)?;
            }
            path.pop();
        }
        // A directory that was there keeps what it has.
        if is_new {
            self.attributes(&target, &stat).map_err(failed("set the attributes of the copy of"))
        } else {
            Ok(())
        }
    }

    fn file(
        &mut self,
        from: BorrowedFd<'_>,
        from_name: &OsStr,
        into: BorrowedFd<'_>,
        name: &OsStr,
        path: &CopyPath,
    ) -> Result<(), CopyError> {
        let failed = |action: &'static str| move |errno| CopyError::at(action, &path.shown, errno);
        // A fifo in the place of the file would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let source = openat(from, from_name, flags, Mode::empty()).map_err(failed("open"))?;
        let stat = fstat(&source).map_err(failed("look up"))?;
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let target = match openat(into, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(target) => target,
            Err(Errno::ISDIR | Errno::LOOP | Errno::NXIO) => return Err(in_the_way(into, name, path)),
            Err(errno) => return Err(failed("make the copy of")(errno)),
        };
        let there = fstat(&target).map_err(failed("look up the copy of"))?;
        if FileType::from_raw_mode(there.st_mode) != FileType::RegularFile {
            return Err(in_the_way(into, name, path));
        }
        // The same file: a file system of the host that the container has as a volume.
        if (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(());
        }
        rustix::fs::ftruncate(&target, 0).map_err(failed("make the copy of"))?;
        let io_failed = |source| CopyError::File { action: "copy", path: path.shown.clone(), source };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let most = if size == 0 { UNKNOWN_SIZE } else { size };
        let left = self.limits.bytes.saturating_sub(self.bytes);
        let (source, mut target) = (File::from(source), File::from(target));
        // One byte more than is left shows that there is more.
        let copied =
            io::copy(&mut source.take(most.min(left.saturating_add(1))), &mut target).map_err(io_failed)?;
        self.bytes += copied;
        if copied > left {
            return Err(CopyError::TooLarge { bytes: self.limits.bytes });
        }
        self.attributes(&target, &stat).map_err(failed("set the attributes of the copy of"))
    }

    fn link(
        &mut self,
        from: BorrowedFd<'_>,
        from_name: &OsStr,
        stat: &Stat,
        (into, name): (BorrowedFd<'_>, &OsStr),
        path: &CopyPath,
    ) -> Result<(), CopyError> {
        let failed = |action: &'static str| move |errno| CopyError::at(action, &path.shown, errno);
        let target = readlinkat(from, from_name, Vec::new()).map_err(failed("read the link"))?;
        match symlinkat(&target, into, name) {
            Err(Errno::EXIST) => {
                let there =
                    statat(into, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look up the copy of"))?;
                if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
                    return Err(in_the_way(into, name, path));
                }
                unlinkat(into, name, AtFlags::empty()).map_err(failed("replace the copy of"))?;
                symlinkat(&target, into, name).map_err(failed("make the copy of"))?;
            }
            made => made.map_err(failed("make the copy of"))?,
        }
        if self.options.owners {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            chownat(into, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failed("set the owner of"))?;
        }
        Ok(())
    }

    /// Owners come first, since a change of the owner takes setuid away.
    fn attributes(&self, target: impl AsFd, stat: &Stat) -> rustix::io::Result<()> {
        if self.options.owners {
            fchown(&target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
        }
        let bits = if self.options.special_bits { 0o7777 } else { 0o777 };
        fchmod(&target, Mode::from_raw_mode(stat.st_mode & bits))?;
        let time = Timespec { tv_sec: stat.st_mtime as _, tv_nsec: stat.st_mtime_nsec as _ };
        futimens(&target, &Timestamps { last_access: time, last_modification: time })
    }

    fn is_excluded(&self, path: &CopyPath) -> bool {
        let name = path.below.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
        self.excludes.iter().any(|pattern| pattern.matches_path(&path.below) || pattern.matches(&name))
    }
}

/// The path of a file, for errors and for patterns.
#[derive(Debug)]
struct CopyPath {
    shown: PathBuf,
    /// The part below the source.
    below: PathBuf,
}

impl CopyPath {
    fn new(source: &Path) -> Self {
        Self { shown: source.to_owned(), below: PathBuf::new() }
    }

    fn depth(&self) -> usize {
        self.below.iter().count()
    }

    fn push(&mut self, name: &OsStr) {
        self.shown.push(name);
        self.below.push(name);
    }

    fn pop(&mut self) {
        self.shown.pop();
        self.below.pop();
    }

    fn printable(&self) -> String {
        machinen::text::printable(&self.shown.to_string_lossy())
    }
}

/// The names in a directory, but for `.` and `..`.
fn names(dir: &OwnedFd, shown: &Path) -> Result<Vec<OsString>, CopyError> {
    let failed = |errno| CopyError::at("list", shown, errno);
    let mut names = Vec::new();
    for entry in Dir::read_from(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        // The kernel gives no such name, and a guest must not.
        if !matches!(name, b"." | b".." | b"") && !name.contains(&b'/') {
            names.push(OsStr::from_bytes(name).to_owned());
        }
        if names.len() as u64 > CopyLimits::DEFAULT.entries {
            return Err(CopyError::TooMany { entries: CopyLimits::DEFAULT.entries });
        }
    }
    names.sort();
    Ok(names)
}

/// What prevents a copy.
fn in_the_way(into: BorrowedFd<'_>, name: &OsStr, path: &CopyPath) -> CopyError {
    let kind =
        statat(into, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let mut in_the_way = path.shown.clone();
    in_the_way.set_file_name(name);
    let shown = if path.depth() == 0 { PathBuf::from(name) } else { in_the_way };
    CopyError::InTheWay { path: shown, kind: kind_name(kind.unwrap_or(FileType::Unknown)) }
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "file of an unknown type",
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    fn place(dir: &Path, name: &str) -> Place {
        let parent = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        Place { parent, name: name.into(), shown: dir.join(name) }
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("s/d/e")).unwrap();
        fs::write(path("s/d/e/f"), "content").unwrap();
        fs::write(path("s/d/x.log"), "log").unwrap();
        fs::set_permissions(path("s/d/e/f"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("/etc/passwd", path("s/link")).unwrap();
        nix::unistd::mkfifo(&path("s/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        dir
    }

    fn copied(
        dir: &Path,
        excludes: &[&str],
        options: CopyOptions,
        limits: CopyLimits,
    ) -> (Result<(), CopyError>, Vec<String>) {
        let excludes = excludes.iter().map(|pattern| Pattern::new(pattern).unwrap()).collect();
        let mut copy = TreeCopy::new(excludes, options, limits);
        let into = place(dir, ".").parent;
        (copy.copy(&place(dir, "s"), &into, "t".as_ref()), copy.left_out)
    }

    const PLAIN: CopyOptions = CopyOptions { owners: false, special_bits: false };

    #[test]
    fn a_tree_is_copied_with_modes_times_and_links() {
        let dir = tree();
        let path = |name: &str| dir.path().join(name);
        let (result, left_out) = copied(dir.path(), &[], PLAIN, CopyLimits::DEFAULT);
        result.unwrap();
        assert!(left_out.len() == 1 && left_out[0].ends_with("s/fifo (fifo)"), "{left_out:?}");
        assert_eq!(fs::read_to_string(path("t/d/e/f")).unwrap(), "content");
        assert_eq!(fs::read_link(path("t/link")).unwrap(), Path::new("/etc/passwd"));
        let (from, to) = (fs::metadata(path("s/d/e/f")).unwrap(), fs::metadata(path("t/d/e/f")).unwrap());
        assert_eq!(to.permissions().mode() & 0o7777, 0o751);
        assert_eq!(from.modified().unwrap(), to.modified().unwrap());
        // Once more over what is there.
        copied(dir.path(), &[], CopyOptions { special_bits: true, ..PLAIN }, CopyLimits::DEFAULT).0.unwrap();
        assert_eq!(fs::metadata(path("t/d/e/f")).unwrap().permissions().mode() & 0o7777, 0o4751);
    }

    #[test]
    fn patterns_leave_out_names_and_paths() {
        let dir = tree();
        copied(dir.path(), &["*.log", "d/e"], PLAIN, CopyLimits::DEFAULT).0.unwrap();
        assert!(dir.path().join("t/d").is_dir());
        assert!(!dir.path().join("t/d/x.log").exists() && !dir.path().join("t/d/e").exists());
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let dir = tree();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("victim")).unwrap();
        fs::create_dir(path("t")).unwrap();
        symlink(path("victim"), path("t/d")).unwrap();
        let error = copied(dir.path(), &[], PLAIN, CopyLimits::DEFAULT).0.unwrap_err();
        assert!(matches!(error, CopyError::InTheWay { kind: "symbolic link", .. }), "{error}");
        fs::remove_file(path("t/d")).unwrap();
        fs::create_dir_all(path("t/d/e")).unwrap();
        symlink(path("victim/f"), path("t/d/e/f")).unwrap();
        assert!(copied(dir.path(), &[], PLAIN, CopyLimits::DEFAULT).0.is_err());
        assert_eq!(fs::read_dir(path("victim")).unwrap().count(), 0);
    }

    #[test]
    fn bounds_end_a_copy() {
        let dir = tree();
        let limits = |limits: CopyLimits| copied(dir.path(), &[], PLAIN, limits).0.unwrap_err();
        let default = CopyLimits::DEFAULT;
        assert!(matches!(limits(CopyLimits { bytes: 5, ..default }), CopyError::TooLarge { bytes: 5 }));
        assert!(matches!(limits(CopyLimits { entries: 3, ..default }), CopyError::TooMany { .. }));
        assert!(matches!(limits(CopyLimits { depth: 2, ..default }), CopyError::TooDeep { .. }));
    }
}
