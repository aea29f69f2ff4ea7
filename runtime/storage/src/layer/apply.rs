//! Applies an archive to a directory, entry by entry.
//!
//! Entries arrive depth first, so the directory of an entry is always open already: there is one descriptor
//! for it, and the names that lead to it. A directory is finished when the first entry after its last one
//! arrives. Then its time is set, and for [`LayerTarget::Whole`](super::LayerTarget) the files that the guest
//! did not touch are added. Nothing is kept in memory about finished directories.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use machinen_base::owner;
use machinen_protocol::layer::{MAX_RECORDS, OPAQUE};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
        XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, lsetxattr,
        makedev, mkdirat, mknodat, openat, openat2, symlinkat, utimensat,
    },
    io::Errno,
};

use super::{
    LayerError, LayerLimits,
    archive::{self, ArchiveEntry, Components, EntryNode, lossy},
    lower::Lower,
};

const BUFFER: usize = 64 << 10;
/// The size of a file on a disk is a multiple of this many bytes.
const BLOCK: u64 = 4096;
/// Bytes of an inode, which every entry needs, and what ext4 keeps in it: a short link's target, and attributes.
const INODE: u64 = 256;
const LINK_IN_INODE: usize = 59;
const ATTRIBUTES_IN_INODE: usize = 96;
/// Bytes of a name's record in its directory, besides the name.
const NAME: u64 = 12;
/// The most bytes after the archive's end, which is padded to a whole record.
const TAIL: u64 = 64 << 10;

/// Bytes after which the free space is looked at again. Other exports and disks take space at the same time.
const SPACE_STEP: u64 = 1 << 20;

/// Character devices that every container may have: memory devices, terminals, fuse and tun.
const DEVICES: [(u32, u32); 10] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 229), (10, 200)];

/// Device nodes that are logged one by one; of more, only the number is.
const DEVICES_LOGGED: u64 = 3;

/// What an archive has made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AppliedLayer {
    /// The number of entries of the archive.
    pub entries: u64,
    /// Bytes on the disk, in whole blocks.
    pub bytes: u64,
    /// Device nodes that were left out.
    pub devices_left_out: u64,
}

/// Applies an archive to the empty directory `root`. With `lower`, a whole root file system, the result is
/// that file system with the archive's changes. Without it the result is the changes alone, with overlayfs's
/// marks.
///
/// Reads `archive` to its end, which must come only when the archive is known to be complete.
///
/// # Errors
/// The archive is not one that the guest's agent would send, or exceeds the limits, or the host's file system
/// fails. What was made remains.
pub fn apply(
    archive: impl Read,
    root: BorrowedFd<'_>,
    lower: Option<BorrowedFd<'_>>,
    limits: LayerLimits,
) -> Result<AppliedLayer, LayerError> {
    let mut archive = tar::Archive::new(archive);
    let mut applier = Applier {
        root,
        lower: lower.map(Lower::new),
        limits,
        applied: AppliedLayer::default(),
        space_known_to: 0,
        open: Vec::new(),
        dir: duplicate(root)?,
        buffer: vec![0; BUFFER],
    };
    let mut records: Option<Vec<u8>> = None;
    for entry in archive.entries().map_err(LayerError::Read)?.raw(true) {
        let mut entry = entry.map_err(LayerError::Read)?;
        let header = entry.header().clone();
        if archive::is_extended(&header) {
            if entry.size() > MAX_RECORDS as u64 {
                return Err(LayerError::Archive { what: "has too long an extended header" });
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(LayerError::Read)?;
            if records.replace(bytes).is_some() {
                return Err(LayerError::Archive { what: "has two extended headers for one entry" });
            }
            continue;
        }
        let size = entry.size();
        let parsed = archive::parse(&header, size, &records.take().unwrap_or_default());
        applier.entry(parsed.map_err(|(path, what)| LayerError::Entry { path, what })?, size, &mut entry)?;
    }
    if records.is_some() {
        return Err(LayerError::Archive { what: "ends with an extended header" });
    }
    let tail = io::copy(&mut archive.into_inner().take(TAIL), &mut io::sink()).map_err(LayerError::Read)?;
    if tail == TAIL {
        return Err(LayerError::Archive { what: "continues after its end" });
    }
    applier.finish()
}

/// A directory whose entries are still arriving.
struct OpenDir {
    /// Empty for the root.
    name: Vec<u8>,
    mtime: (i64, u32),
    /// The entries of the lower root file system are to be added.
    merged: bool,
    /// No file of a lower layer is visible in it.
    opaque: bool,
}

struct Applier<'a> {
    root: BorrowedFd<'a>,
    lower: Option<Lower<'a>>,
    limits: LayerLimits,
    applied: AppliedLayer,
    /// There was space for so many bytes of `applied`.
    space_known_to: u64,
    /// The directories from the root to the current one; none before the first entry.
    open: Vec<OpenDir>,
    /// The last of `open`.
    dir: OwnedFd,
    buffer: Vec<u8>,
}

impl Applier<'_> {
    fn entry(&mut self, entry: ArchiveEntry, size: u64, content: &mut impl Read) -> Result<(), LayerError> {
        self.applied.entries += 1;
        if self.applied.entries > self.limits.entries {
            return Err(LayerError::Entries { limit: self.limits.entries });
        }
        self.charge(besides_content(&entry))?;
        let Some((name, parents)) = entry.path.split_last() else { return self.begin(&entry) };
        self.enter(parents).map_err(|what| refused(&entry.path, what))?;
        let failed = |action| {
            let path = &entry.path;
            move |errno: Errno| match errno {
                Errno::EXIST => refused(path, "comes twice"),
                errno => write_error(action, path, errno.into()),
            }
        };
        match &entry.node {
            EntryNode::Directory => self.directory(&entry, name),
            EntryNode::File | EntryNode::Sparse(_) => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = openat(&self.dir, name.as_slice(), flags, Mode::RUSR | Mode::WUSR);
                let file = File::from(file.map_err(failed("create"))?);
                match entry.node {
                    EntryNode::Sparse(full) => self.pieces(&entry, size, full, content, &file)?,
                    _ => self.content(&entry, size, content, &file)?,
                }
                set_metadata(file.as_fd(), &entry, true)
            }
            EntryNode::Symlink(target) => {
                symlinkat(target.as_c_str(), &self.dir, name.as_slice())
                    .map_err(failed("create the link"))?;
                self.set_metadata_by_name(&entry, name)
            }
            EntryNode::Link(target) => self.link(&entry.path, name, target),
            // No process listens on this socket. It is only a name, as the container's socket is after the
            // container's end.
            EntryNode::Fifo | EntryNode::Socket => {
                let kind = if entry.node == EntryNode::Fifo { FileType::Fifo } else { FileType::Socket };
                mknodat(&self.dir, name.as_slice(), kind, Mode::RUSR, 0).map_err(failed("create"))?;
                self.set_metadata_by_name(&entry, name)
            }
            EntryNode::Character(0, 0) => self.removal(&entry, name),
            EntryNode::Character(major, minor) if DEVICES.contains(&(*major, *minor)) => {
                let device = makedev(*major, *minor);
                mknodat(&self.dir, name.as_slice(), FileType::CharacterDevice, Mode::RUSR, device)
                    .map_err(failed("create"))?;
                self.set_metadata_by_name(&entry, name)
            }
            EntryNode::Character(major, minor) | EntryNode::Block(major, minor) => {
                self.applied.devices_left_out += 1;
                if self.applied.devices_left_out <= DEVICES_LOGGED {
                    let path = lossy(&entry.path.join(&b'/'));
                    let device = format!("{major}:{minor}");
                    tracing::warn!(
                        path,
                        device,
                        "a device node of the container is left out of its snapshot"
                    );
                }
                self.leave_out(&entry, name)
            }
        }
    }

    /// The first entry: the root itself.
    fn begin(&mut self, entry: &ArchiveEntry) -> Result<(), LayerError> {
        if !self.open.is_empty() || entry.node != EntryNode::Directory {
            return Err(refused(&entry.path, "comes twice, or is not a directory"));
        }
        let merged = self.lower.is_some() && !is_opaque(entry);
        set_metadata(self.dir.as_fd(), entry, self.lower.is_none())?;
        self.open.push(OpenDir { name: Vec::new(), mtime: entry.mtime, merged, opaque: is_opaque(entry) });
        Ok(())
    }

    fn directory(&mut self, entry: &ArchiveEntry, name: &[u8]) -> Result<(), LayerError> {
        self.charge(BLOCK)?;
        match mkdirat(&self.dir, name, Mode::RWXU) {
            Err(Errno::EXIST) => return Err(refused(&entry.path, "comes twice")),
            made => made.map_err(|errno| write_error("create", &entry.path, errno.into()))?,
        }
        let dir = openat(&self.dir, name, directory_flags(), Mode::empty())
            .map_err(|errno| write_error("open", &entry.path, errno.into()))?;
        set_metadata(dir.as_fd(), entry, self.lower.is_none())?;
        let above = self.open.last().is_some_and(|open| open.merged);
        let merged = match &self.lower {
            Some(lower) if above && !is_opaque(entry) => lower.has_dir(&entry.path)?,
            _ => false,
        };
        let opaque = is_opaque(entry) || self.open.last().is_some_and(|open| open.opaque);
        self.open.push(OpenDir { name: name.to_owned(), mtime: entry.mtime, merged, opaque });
        self.dir = dir;
        Ok(())
    }

    /// Finishes directories until the one that `parents` names is the current one.
    fn enter(&mut self, parents: &[Vec<u8>]) -> Result<(), EntryRefusal> {
        if self.open.is_empty() {
            return Err(EntryRefusal::What("comes before the root"));
        }
        let names = self.open[1..].iter().map(|open| &open.name);
        let common = names.zip(parents).take_while(|(open, parent)| open == parent).count();
        while self.open.len() - 1 > common {
            self.leave().map_err(|error| EntryRefusal::Error(Box::new(error)))?;
        }
        if common < parents.len() {
            return Err(EntryRefusal::What("comes before its directory, or long after it"));
        }
        Ok(())
    }

    /// Finishes the current directory and makes its parent the current one.
    fn leave(&mut self) -> Result<(), LayerError> {
        let path: Components = self.open[1..].iter().map(|open| open.name.clone()).collect();
        let Some(last) = self.open.pop() else { return Ok(()) };
        if let Some(lower) = &self.lower {
            lower.complete(self.dir.as_fd(), &path, last.merged)?;
        }
        futimens(&self.dir, &times(last.mtime))
            .map_err(|errno| write_error("set the time of", &path, errno.into()))?;
        if let Some((_, parents)) = path.split_last() {
            self.dir = open_dir(self.root, parents, directory_flags())
                .map_err(|errno| write_error("open", parents, errno.into()))?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<AppliedLayer, LayerError> {
        if self.open.is_empty() {
            return Err(LayerError::Archive { what: "is empty" });
        }
        while !self.open.is_empty() {
            self.leave()?;
        }
        let devices = self.applied.devices_left_out;
        if devices > DEVICES_LOGGED {
            tracing::warn!(devices, "this many device nodes of the container are left out of its snapshot");
        }
        Ok(self.applied)
    }

    fn content(
        &mut self,
        entry: &ArchiveEntry,
        size: u64,
        content: &mut impl Read,
        mut file: &File,
    ) -> Result<(), LayerError> {
        self.charge(size.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX))?;
        let mut left = size;
        while left > 0 {
            let read = self.read(left, content)?;
            file.write_all(&self.buffer[..read]).map_err(|error| write_error("write", &entry.path, error))?;
            left -= read as u64;
        }
        Ok(())
    }

    fn pieces(
        &mut self,
        entry: &ArchiveEntry,
        size: u64,
        full: u64,
        content: &mut impl Read,
        file: &File,
    ) -> Result<(), LayerError> {
        let (pieces, taken) = archive::read_map(content, full).map_err(|what| refused(&entry.path, what))?;
        let total = pieces.iter().try_fold(taken, |sum, (_, length)| sum.checked_add(*length));
        if total != Some(size) {
            return Err(refused(&entry.path, "has more or less data than the map of its holes states"));
        }
        for (offset, length) in pieces {
            let end = offset + length;
            self.charge(end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX) - offset / BLOCK * BLOCK)?;
            let mut at = offset;
            while at < end {
                let read = self.read(end - at, content)?;
                file.write_all_at(&self.buffer[..read], at)
                    .map_err(|error| write_error("write", &entry.path, error))?;
                at += read as u64;
            }
        }
        ftruncate(file, full).map_err(|errno| write_error("set the size of", &entry.path, errno.into()))
    }

    /// Reads some of the next `left` bytes into the buffer.
    fn read(&mut self, left: u64, content: &mut impl Read) -> Result<usize, LayerError> {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
        match content.read(&mut self.buffer[..most]).map_err(LayerError::Read)? {
            0 => Err(LayerError::Archive { what: "ends in the middle of a file" }),
            read => Ok(read),
        }
    }

    fn link(&self, path: &[Vec<u8>], name: &[u8], target: &[Vec<u8>]) -> Result<(), LayerError> {
        let Some((target_name, parents)) = target.split_last() else {
            return Err(refused(path, "is a hard link to the root"));
        };
        let dir = open_dir(self.root, parents, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC);
        let linked =
            dir.and_then(|dir| linkat(dir, target_name.as_slice(), &self.dir, name, AtFlags::empty()));
        linked.map_err(|errno| match errno {
            Errno::EXIST => refused(path, "comes twice"),
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::PERM => {
                refused(path, "is a hard link to something that is not a file of the archive")
            }
            errno => write_error("create the hard link", path, errno.into()),
        })
    }

    /// Hides the lower layers' file in the place of an entry that is left out.
    ///
    /// In an opaque directory there must be no mark. overlayfs does not merge such a directory, so the mark
    /// would be listed as a name that cannot be looked up, and containerd could not compare or commit the
    /// snapshot.
    fn leave_out(&self, entry: &ArchiveEntry, name: &[u8]) -> Result<(), LayerError> {
        if self.open.last().is_some_and(|open| open.opaque) { Ok(()) } else { self.removal(entry, name) }
    }

    /// Marks the lower layers' file of that name as removed. A whole root file system needs the mark only
    /// until the directory is finished, and only if there is a file to hide.
    fn removal(&self, entry: &ArchiveEntry, name: &[u8]) -> Result<(), LayerError> {
        mknodat(&self.dir, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0)).map_err(|errno| {
            match errno {
                Errno::EXIST => refused(&entry.path, "comes twice"),
                errno => write_error("mark as removed", &entry.path, errno.into()),
            }
        })
    }

    /// Sets owner, mode, attributes and time of a file that must not be opened.
    fn set_metadata_by_name(&self, entry: &ArchiveEntry, name: &[u8]) -> Result<(), LayerError> {
        let failed = |action| move |errno: Errno| write_error(action, &entry.path, errno.into());
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        chownat(&self.dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("set the owner of"))?;
        if !matches!(entry.node, EntryNode::Symlink(_)) {
            // The file has just been made here, so it is not a link.
            chmodat(&self.dir, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(failed("set the mode of"))?;
        }
        for (key, value) in &entry.xattrs {
            let path = [format!("/proc/self/fd/{}/", self.dir.as_raw_fd()).as_bytes(), name].concat();
            lsetxattr(path, key.as_c_str(), value, XattrFlags::empty())
                .map_err(failed("set an attribute of"))?;
        }
        utimensat(&self.dir, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("set the time of"))
    }

    fn charge(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.applied.bytes = self.applied.bytes.saturating_add(bytes);
        if self.applied.bytes > self.limits.bytes {
            return Err(LayerError::Bytes { limit: self.limits.bytes });
        }
        if self.applied.bytes > self.space_known_to {
            self.look_for_space(bytes.max(SPACE_STEP))?;
        }
        Ok(())
    }

    /// Checks that the part of the archive that comes next, which takes `bytes`, leaves the host its space.
    fn look_for_space(&mut self, bytes: u64) -> Result<(), LayerError> {
        if !self.limits.reserve.is_nothing() {
            let space = self.limits.reserve.space(self.root);
            let space = space.map_err(|source| write_error("look for free space for", &[], source))?;
            if space.usable() < bytes {
                return Err(LayerError::NoSpace { space });
            }
        }
        self.space_known_to = self.applied.bytes.saturating_add(SPACE_STEP);
        Ok(())
    }
}

/// What an entry takes on a disk besides its content, as ext4 stores it.
fn besides_content(entry: &ArchiveEntry) -> u64 {
    let attributes: usize =
        entry.xattrs.iter().map(|(name, value)| name.as_bytes().len() + value.len()).sum();
    let link = match &entry.node {
        EntryNode::Symlink(target) => target.as_bytes().len(),
        _ => 0,
    };
    let blocks = |bytes: usize, in_inode: usize| match bytes > in_inode {
        true => (bytes as u64).next_multiple_of(BLOCK),
        false => 0,
    };
    let name = entry.path.last().map_or(0, |name| NAME + name.len() as u64);
    INODE + name + blocks(attributes, ATTRIBUTES_IN_INODE) + blocks(link, LINK_IN_INODE)
}

/// Sets owner, mode, attributes and time of an open file or directory; if `marked`, also overlayfs's marks.
fn set_metadata(file: BorrowedFd<'_>, entry: &ArchiveEntry, marked: bool) -> Result<(), LayerError> {
    let failed = |action| move |errno: Errno| write_error(action, &entry.path, errno.into());
    // In this order, because a change of the owner clears setuid bits and capabilities.
    fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .map_err(failed("set the owner of"))?;
    fchmod(file, Mode::from_raw_mode(entry.mode)).map_err(failed("set the mode of"))?;
    for (key, value) in &entry.xattrs {
        if let Some(key) = on_host(key)
            && (marked || key != opaque_mark())
        {
            set_xattr(file, key, value).map_err(failed("set an attribute of"))?;
        }
    }
    futimens(file, &times(entry.mtime)).map_err(failed("set the time of"))
}

/// The name by which overlayfs of this process's user namespace knows an opaque directory.
pub(super) fn opaque_mark() -> &'static CStr {
    match owner::user() {
        None => c"trusted.overlay.opaque",
        Some(_) => c"user.overlay.opaque",
    }
}

/// The name that an attribute of a container has on the host. An ordinary user can set no trusted attribute, and overlayfs would
/// take the container's own attributes of overlayfs for its marks: None, they are left out.
fn on_host(key: &CStr) -> Option<&CStr> {
    if owner::user().is_none() {
        return Some(key);
    }
    match key.to_bytes() {
        name if name == OPAQUE.0.as_bytes() => Some(opaque_mark()),
        name if name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") => None,
        _ => Some(key),
    }
}

pub(super) fn set_xattr(file: BorrowedFd<'_>, key: &CStr, value: &[u8]) -> Result<(), Errno> {
    fsetxattr(file, key, value, XattrFlags::empty())
}

fn is_opaque(entry: &ArchiveEntry) -> bool {
    entry.xattrs.iter().any(|(key, _)| key.as_bytes() == OPAQUE.0.as_bytes())
}

pub(super) fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Timestamps { last_access, last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() } }
}

pub(super) fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// Opens a directory below `root`, through directories only.
pub(super) fn open_dir(root: BorrowedFd<'_>, path: &[Vec<u8>], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b".".to_vec() } else { path.join(&b'/') };
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    openat2(root, path, flags, Mode::empty(), resolve)
}

fn duplicate(root: BorrowedFd<'_>) -> Result<OwnedFd, LayerError> {
    // Not dup(2): the position in the directory would be shared.
    openat(root, c".", directory_flags(), Mode::empty())
        .map_err(|errno| write_error("open", &[], errno.into()))
}

/// Why an entry is refused because of its place.
enum EntryRefusal {
    What(&'static str),
    Error(Box<LayerError>),
}

impl From<&'static str> for EntryRefusal {
    fn from(what: &'static str) -> Self {
        Self::What(what)
    }
}

fn refused(path: &[Vec<u8>], refusal: impl Into<EntryRefusal>) -> LayerError {
    match refusal.into() {
        EntryRefusal::What(what) => LayerError::Entry { path: name(path), what },
        EntryRefusal::Error(error) => *error,
    }
}

pub(super) fn write_error(action: &'static str, path: &[Vec<u8>], source: io::Error) -> LayerError {
    LayerError::Write { action, path: name(path), source }
}

fn name(path: &[Vec<u8>]) -> String {
    if path.is_empty() { ".".to_owned() } else { lossy(&path.join(&b'/')) }
}
