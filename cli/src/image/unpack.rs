//! Unpacks layers into a directory (OCI image-spec, layer.md). The archives are not trusted.
//!
//! Parents of an entry are looked up with the directory as the root (openat2(2), RESOLVE_IN_ROOT), so that an image's own
//! links lead to its own files, as they would in the container. The entry itself is made by its name in that parent, and
//! replaces what was there; nothing is written through a link. Device nodes are left out, since no node may exist that
//! opens a disk of the host, and containers get theirs from the runtime. Entries, bytes, names and depth are bounded.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
        chownat, fchmod, fchown, fsetxattr, futimens, linkat, mkdirat, mknodat, openat, openat2, statat,
        symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use tar::{Entry, EntryType, Header};

use super::ImageError;

/// Most entries of all layers of an image.
const MAX_ENTRIES: u64 = 2_000_000;
/// Most bytes of all files of an image.
const MAX_BYTES: u64 = 64 << 30;
/// Most bytes of a name, and most directories above an entry.
const MAX_PATH: usize = 4000;
const MAX_DEPTH: usize = 512;
/// Most bytes of a small file that the host reads from an image.
const MAX_SMALL: u64 = 1 << 20;

/// Marks of removed files (layer.md, "Whiteouts"). The second removes all that lower layers have in its directory. Other
/// names that begin with `.wh..wh.` are aufs's own.
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS: &[u8] = b".wh..wh.";

/// The attributes of files that are kept, in records with this prefix.
const XATTR: &str = "SCHILY.xattr.";
const KEPT_XATTRS: [&str; 2] = ["security.capability", "user."];

/// The directory that an image is unpacked into, and how much of its bounds is left.
#[derive(Debug)]
pub(super) struct UnpackDir {
    root: OwnedFd,
    entries: u64,
    bytes: u64,
    /// Times of directories, which their content would change.
    times: BTreeMap<PathBuf, i64>,
}

/// What a layer removes from the ones below it.
#[derive(Debug, Default)]
pub(super) struct Whiteouts {
    /// `(directory, name)`; no name: all that is in the directory.
    marks: Vec<(PathBuf, Option<OsString>)>,
}

impl UnpackDir {
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, entries: 0, bytes: 0, times: BTreeMap::new() }
    }

    /// Reads a layer, and changes nothing.
    ///
    /// # Errors
    /// The archive is not understood, or exceeds the bounds.
    pub(super) fn whiteouts(layer: impl Read) -> Result<Whiteouts, ImageError> {
        let mut whiteouts = Whiteouts::default();
        let mut count = 0;
        let mut archive = tar::Archive::new(layer);
        for entry in archive.entries().map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            count += 1;
            if count > MAX_ENTRIES {
                return Err(ImageError::Bounds { what: "files", most: MAX_ENTRIES });
            }
            let path = checked_path(&entry.path_bytes())?;
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let mark = match name.as_bytes() {
                OPAQUE => None,
                name if name.starts_with(AUFS) => continue,
                name => match name.strip_prefix(WHITEOUT) {
                    Some(b"" | b"." | b"..") => return Err(odd(&path, "it removes no name")),
                    Some(removed) => Some(OsStr::from_bytes(removed).to_owned()),
                    None => continue,
                },
            };
            whiteouts.marks.push((parent.to_owned(), mark));
        }
        Ok(whiteouts)
    }

    /// Removes what a layer removes.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub(super) fn remove(&self, whiteouts: &Whiteouts) -> Result<(), ImageError> {
        for (dir, name) in &whiteouts.marks {
            let failed = |errno: Errno| unpack(dir, errno);
            // A mark for a directory that no lower layer has removes nothing.
            let Some(parent) = self.look_up(dir).map_err(failed)? else { continue };
            match name {
                Some(name) => remove(&parent, name, 0).map_err(failed)?,
                None => {
                    for name in names(&parent).map_err(failed)? {
                        remove(&parent, &name, 0).map_err(failed)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the files of a layer.
    ///
    /// # Errors
    /// The archive is not understood or exceeds the bounds, or a file cannot be made.
    pub(super) fn apply(&mut self, layer: impl Read) -> Result<(), ImageError> {
        let mut archive = tar::Archive::new(layer);
        for entry in archive.entries().map_err(unreadable)? {
            let mut entry = entry.map_err(unreadable)?;
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(ImageError::Bounds { what: "files", most: MAX_ENTRIES });
            }
            let path = checked_path(&entry.path_bytes())?;
            if path.file_name().is_some_and(|name| name.as_bytes().starts_with(WHITEOUT)) {
                continue;
            }
            self.entry(&mut entry, &path)?;
        }
        Ok(())
    }

    /// Gives the directories their times, when nothing more is made in them.
    ///
    /// # Errors
    /// The file system refuses.
    pub(super) fn finish(self) -> Result<(), ImageError> {
        for (path, time) in &self.times {
            let failed = |errno| unpack(path, errno);
            // A later layer may have removed it.
            let Some(dir) = self.look_up(path).map_err(failed)? else { continue };
            let opened =
                openat(&dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            futimens(opened.map_err(failed)?, &times(*time)).map_err(failed)?;
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>, path: &Path) -> Result<(), ImageError> {
        let failed = |errno| unpack(path, errno);
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return self.root_attributes(entry);
        };
        let parent = self.parent(above).map_err(failed)?;
        let header = entry.header().clone();
        match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                return self.file(entry, &parent, name, path);
            }
            EntryType::Directory => {
                let dir = directory(&parent, name).map_err(failed)?;
                attributes(&dir, entry, path)?;
                self.times.insert(path.to_owned(), mtime(&header));
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or_else(|| odd(path, "the link has no target"))?;
                if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
                    return Err(odd(path, "the link's target is not valid"));
                }
                remove(&parent, name, 0).map_err(failed)?;
                symlinkat(OsStr::from_bytes(&target), &parent, name).map_err(failed)?;
                attributes_of_name(&parent, name, &header).map_err(failed)?;
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().ok_or_else(|| odd(path, "the link has no target"))?;
                self.hard_link(&parent, name, &checked_path(&target)?, path)?;
            }
            EntryType::Fifo => {
                remove(&parent, name, 0).map_err(failed)?;
                let mode = Mode::from_raw_mode(mode(&header));
                mknodat(&parent, name, FileType::Fifo, mode, 0).map_err(failed)?;
                attributes_of_name(&parent, name, &header).map_err(failed)?;
            }
            EntryType::Char | EntryType::Block => {
                tracing::debug!(path = %path.display(), "a device is left out");
            }
            EntryType::XGlobalHeader => {}
            _ => return Err(odd(path, "its type is not known")),
        }
        Ok(())
    }

    /// The first entry of an archive may be the root itself.
    fn root_attributes<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ImageError> {
        if entry.header().entry_type() != EntryType::Directory {
            return match entry.header().entry_type() {
                EntryType::XGlobalHeader => Ok(()),
                _ => Err(odd(Path::new("."), "it is in the place of the root directory")),
            };
        }
        let time = mtime(entry.header());
        let root = self.root.try_clone().map_err(|source| ImageError::Unpack { path: ".".into(), source })?;
        attributes(&root, entry, Path::new("."))?;
        self.times.insert(PathBuf::new(), time);
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        path: &Path,
    ) -> Result<(), ImageError> {
        let failed = |errno| unpack(path, errno);
        remove(parent, name, 0).map_err(failed)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?);
        let left = MAX_BYTES - self.bytes;
        let copied = io::copy(&mut entry.by_ref().take(left + 1), &mut file)
            .map_err(|source| ImageError::Unpack { path: path.to_owned(), source })?;
        if copied > left {
            return Err(ImageError::Bounds { what: "bytes", most: MAX_BYTES });
        }
        self.bytes += copied;
        attributes(&file, entry, path)?;
        futimens(&file, &times(mtime(entry.header()))).map_err(failed)
    }

    /// Another name of a file of the image.
    fn hard_link(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        target: &Path,
        path: &Path,
    ) -> Result<(), ImageError> {
        let failed = |errno| unpack(path, errno);
        let (Some(above), Some(target_name)) = (target.parent(), target.file_name()) else {
            return Err(odd(path, "it is a link to a directory"));
        };
        let missing = || odd(path, "it is a link to a file that the image does not have");
        let from = self.look_up(above).map_err(failed)?.ok_or_else(missing)?;
        match statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(odd(path, "it is a link to a directory"));
            }
            Err(Errno::NOENT) => return Err(missing()),
            found => found.map_err(failed)?,
        };
        let there = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
        let same = |other: &rustix::fs::Stat| {
            statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (other.st_dev, other.st_ino))
        };
        if there.as_ref().is_ok_and(same) {
            return Ok(());
        }
        remove(parent, name, 0).map_err(failed)?;
        linkat(&from, target_name, parent, name, AtFlags::empty()).map_err(failed)
    }

    /// A directory of the image, through the image's own links; None if it does not exist.
    fn look_up(&self, path: &Path) -> rustix::io::Result<Option<OwnedFd>> {
        match in_root(&self.root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC) {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// The directory for an entry; what is missing of it is made.
    fn parent(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        if let Some(dir) = self.look_up(path)? {
            return Ok(dir);
        }
        let mut dir = in_root(&self.root, Path::new(""), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC)?;
        let mut so_far = PathBuf::new();
        for name in path {
            so_far.push(name);
            dir = match self.look_up(&so_far)? {
                Some(next) => next,
                None => directory(&dir, name)?,
            };
        }
        Ok(dir)
    }
}

/// Reads a small file of a root file system, through that file system's own links. None if there is no such file.
///
/// # Errors
/// It cannot be read, or is large.
pub(crate) fn read_in_root(root: &Path, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    let file =
        match in_root(&root, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MAX_SMALL + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_SMALL {
        true => Err(io::ErrorKind::FileTooLarge.into()),
        false => Ok(Some(bytes)),
    }
}

fn in_root(root: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root.as_fd(), path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// Makes a directory, or finds it; what is no directory is replaced.
fn directory(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {}
        Err(Errno::NOTDIR | Errno::LOOP) => remove(parent, name, 0)?,
        opened => return opened,
    }
    mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
    openat(parent, name, flags, Mode::empty())
}

/// Removes a name with all that is below it; a missing one is no error.
fn remove(parent: &OwnedFd, name: &OsStr, depth: usize) -> rustix::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(Errno::ISDIR) if depth <= MAX_DEPTH => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    for child in names(&dir)? {
        remove(&dir, &child, depth + 1)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<OsString>> {
    let dir = openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// Owner, mode and attributes; the owner first, since it takes capabilities and setuid away.
fn attributes<R: Read>(
    file: &impl std::os::fd::AsFd,
    entry: &mut Entry<'_, R>,
    path: &Path,
) -> Result<(), ImageError> {
    let failed = |errno| unpack(path, errno);
    let (uid, gid) = owner(entry.header()).ok_or_else(|| odd(path, "its owner is not a number"))?;
    fchown(file, Some(uid), Some(gid)).map_err(failed)?;
    fchmod(file, Mode::from_raw_mode(mode(entry.header()))).map_err(failed)?;
    let records = entry.pax_extensions().map_err(unreadable)?;
    for record in records.into_iter().flatten() {
        let record = record.map_err(unreadable)?;
        let Some(name) = record.key().ok().and_then(|key| key.strip_prefix(XATTR)) else { continue };
        if KEPT_XATTRS.iter().any(|kept| name.starts_with(kept)) {
            fsetxattr(file, name, record.value_bytes(), XattrFlags::empty()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Those of a file that cannot be opened without an effect.
fn attributes_of_name(parent: &OwnedFd, name: &OsStr, header: &Header) -> rustix::io::Result<()> {
    let (uid, gid) = owner(header).ok_or(Errno::INVAL)?;
    chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    utimensat(parent, name, &times(mtime(header)), AtFlags::SYMLINK_NOFOLLOW)
}

fn owner(header: &Header) -> Option<(Uid, Gid)> {
    // The largest number means "unchanged" to the kernel.
    let id = |id: io::Result<u64>| u32::try_from(id.ok()?).ok().filter(|id| *id != u32::MAX);
    Some((Uid::from_raw(id(header.uid())?), Gid::from_raw(id(header.gid())?)))
}

fn mode(header: &Header) -> u32 {
    header.mode().unwrap_or(0o755) & 0o7777
}

fn mtime(header: &Header) -> i64 {
    header.mtime().ok().and_then(|time| i64::try_from(time).ok()).unwrap_or(0)
}

fn times(seconds: i64) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

/// A relative path without `.`; empty for the root itself.
fn checked_path(bytes: &[u8]) -> Result<PathBuf, ImageError> {
    let shown = || PathBuf::from(String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_PATH)]).into_owned());
    let parts: Vec<_> =
        bytes.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if bytes.len() > MAX_PATH || parts.len() > MAX_DEPTH {
        return Err(odd(&shown(), "its name is too long"));
    }
    if parts.contains(&&b".."[..]) {
        return Err(odd(&shown(), "its name has the component .."));
    }
    if bytes.contains(&0) {
        return Err(odd(&shown(), "its name has a NUL"));
    }
    Ok(parts.into_iter().map(OsStr::from_bytes).collect())
}

fn odd(path: &Path, reason: &'static str) -> ImageError {
    ImageError::Entry { path: path.to_owned(), reason }
}

fn unpack(path: &Path, errno: Errno) -> ImageError {
    ImageError::Unpack { path: path.to_owned(), source: errno.into() }
}

fn unreadable(source: io::Error) -> ImageError {
    ImageError::Read { name: "a layer".to_owned(), source }
}
