//! Packs a directory into the archive of a layer (image-spec, layer.md), or two into that of a root file system.
//!
//! The directory is a root file system, or has what a container has written, with overlayfs's marks, and was filled by
//! [`machinen::layer`]. It is read from open directories, and no link is followed.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read as _, Write},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, Stat, fgetxattr, flistxattr, fstat, major, minor, openat,
        readlinkat, statat,
    },
    io::Errno,
};
use tar::{Builder, EntryType, Header};

use super::ImageError;

/// Beginning of the names that remove something (image-spec, layer.md).
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// overlayfs's mark of a directory that hides the one below it.
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// The beginning of the record of an extended attribute.
const XATTR: &str = "SCHILY.xattr.";
/// The extended attributes that images keep.
const KEPT_XATTRS: [&str; 2] = ["security.capability", "user."];
/// Most bytes of the value of an attribute (xattr(7)), and of all names.
const MAX_XATTR: usize = 64 << 10;
/// Deeper trees were not unpacked either.
const MAX_DEPTH: usize = 1024;

/// What a packed directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed {
    /// A root file system.
    Root,
    /// The upper directory of an overlay, whose marks become those of layers.
    Changes,
}

/// A directory that is being packed.
struct Packer<'a, W: Write> {
    archive: &'a mut Builder<W>,
    /// The first name of each file that has several.
    linked: HashMap<(u64, u64), PathBuf>,
    /// Whether overlayfs's marks become those of layers.
    marks: bool,
    /// Whether a name with the meaning of a mark is an error.
    guest_wrote: bool,
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Packs all that is in a directory.
///
/// # Errors
/// A file cannot be read, or the archive cannot be written.
pub(crate) fn pack<W: Write>(
    archive: &mut Builder<W>,
    root: &Path,
    packed: Packed,
) -> Result<(), ImageError> {
    let marks = packed == Packed::Changes;
    let mut packer = Packer { archive, linked: HashMap::new(), marks, guest_wrote: marks };
    let dir = packer.root(root)?;
    packer.entries(&dir, Path::new(""), 0)
}

/// Packs the root file system that an overlay of `upper` over `lower` shows.
///
/// # Errors
/// A file cannot be read, or the archive cannot be written.
pub(crate) fn pack_merged<W: Write>(
    archive: &mut Builder<W>,
    upper: &Path,
    lower: &Path,
) -> Result<(), ImageError> {
    let failed = |errno: Errno| at(lower, errno.into());
    let below: OwnedFd = rustix::fs::open(lower, DIRECTORY, Mode::empty()).map_err(failed)?;
    let mut packer = Packer { archive, linked: HashMap::new(), marks: false, guest_wrote: true };
    let dir = packer.root(upper)?;
    packer.merged(&dir, Some(&below), Path::new(""), 0)
}

fn at(path: &Path, source: io::Error) -> ImageError {
    ImageError::Pack { path: path.to_owned(), source }
}

impl<W: Write> Packer<'_, W> {
    /// Adds the directory that is the root, and returns it.
    fn root(&mut self, path: &Path) -> Result<OwnedFd, ImageError> {
        let failed = |errno: Errno| at(path, errno.into());
        let dir: OwnedFd = rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(failed)?;
        let stat = fstat(&dir).map_err(failed)?;
        self.add_dir(&dir, &stat, Path::new(".")).map_err(|source| at(Path::new("."), source))?;
        Ok(dir)
    }

    /// Adds what a directory of an overlay shows.
    fn merged(
        &mut self,
        upper: &OwnedFd,
        lower: Option<&OwnedFd>,
        path: &Path,
        depth: usize,
    ) -> Result<(), ImageError> {
        if depth > MAX_DEPTH {
            return Err(at(path, io::Error::other("it is too deep")));
        }
        let failed = |errno: Errno| at(path, errno.into());
        let above: BTreeSet<_> = names(upper).map_err(failed)?.into_iter().collect();
        let mut all = above.clone();
        if let Some(lower) = lower {
            all.extend(names(lower).map_err(failed)?);
        }
        for name in all {
            let below = path.join(&name);
            if !above.contains(&name) {
                // It is in one of the two.
                let Some(lower) = lower else { continue };
                if let Some(child) = self.entry(lower, &name, &below).map_err(|source| at(&below, source))? {
                    self.entries(&child, &below, depth + 1)?;
                }
                continue;
            }
            let entry = |source| at(&below, source);
            // A device that marks what was removed is left out as others are.
            let Some(child) = self.entry(upper, &name, &below).map_err(entry)? else { continue };
            let hidden = is_opaque(&child);
            let lower =
                lower.filter(|_| !hidden).and_then(|dir| openat(dir, &name, DIRECTORY, Mode::empty()).ok());
            self.merged(&child, lower.as_ref(), &below, depth + 1)?;
        }
        Ok(())
    }

    fn entries(&mut self, dir: &OwnedFd, path: &Path, depth: usize) -> Result<(), ImageError> {
        if depth > MAX_DEPTH {
            return Err(at(path, io::Error::other("it is too deep")));
        }
        for name in names(dir).map_err(|errno| at(path, errno.into()))? {
            let below = path.join(&name);
            if let Some(child) = self.entry(dir, &name, &below).map_err(|source| at(&below, source))? {
                self.entries(&child, &below, depth + 1)?;
            }
        }
        Ok(())
    }

    /// Adds one file; returns a directory, whose entries are to follow.
    fn entry(&mut self, dir: &OwnedFd, name: &OsStr, path: &Path) -> io::Result<Option<OwnedFd>> {
        let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if self.guest_wrote && name.as_bytes().starts_with(WHITEOUT.as_bytes()) {
            return Err(io::Error::other("its name means that a file is removed"));
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            match self.linked.get(&(stat.st_dev, stat.st_ino)) {
                Some(first) => {
                    let first = first.clone();
                    let mut header = header(&stat, EntryType::Link);
                    return self.archive.append_link(&mut header, path, first).map(|()| None);
                }
                None => _ = self.linked.insert((stat.st_dev, stat.st_ino), path.to_owned()),
            }
        }
        match kind {
            FileType::Directory => {
                let child = openat(dir, name, DIRECTORY, Mode::empty())?;
                self.add_dir(&child, &stat, path)?;
                return Ok(Some(child));
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = openat(dir, name, flags, Mode::empty())?;
                self.add_xattrs(&file)?;
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                let mut header = header(&stat, EntryType::Regular);
                header.set_size(size);
                let content = File::from(file).take(size);
                // A file that became shorter would make the archive wrong.
                let content = content.chain(io::repeat(0)).take(size);
                self.archive.append_data(&mut header, path, content)?;
            }
            FileType::Symlink => {
                let target = readlinkat(dir, name, Vec::new())?;
                let mut header = header(&stat, EntryType::Symlink);
                self.archive.append_link(&mut header, path, OsStr::from_bytes(target.to_bytes()))?;
            }
            FileType::Fifo => self.add_empty(&stat, EntryType::Fifo, path)?,
            FileType::CharacterDevice
                if self.marks && (major(stat.st_rdev), minor(stat.st_rdev)) == (0, 0) =>
            {
                let mut whiteout = OsString::from(WHITEOUT);
                whiteout.push(name);
                self.add_empty(&stat, EntryType::Regular, &path.with_file_name(whiteout))?;
            }
            // Containers get their devices from the runtime, and no process listens on a socket of an image.
            _ => {}
        }
        Ok(None)
    }

    fn add_dir(&mut self, dir: &OwnedFd, stat: &Stat, path: &Path) -> io::Result<()> {
        self.add_xattrs(dir)?;
        self.add_empty(stat, EntryType::Directory, path)?;
        if self.marks && is_opaque(dir) {
            self.add_empty(stat, EntryType::Regular, &path.join(OPAQUE))?;
        }
        Ok(())
    }

    fn add_empty(&mut self, stat: &Stat, kind: EntryType, path: &Path) -> io::Result<()> {
        self.archive.append_data(&mut header(stat, kind), path, io::empty())
    }

    /// The attributes come in a record before the file.
    fn add_xattrs(&mut self, file: &OwnedFd) -> io::Result<()> {
        let mut list = vec![0; MAX_XATTR];
        let count = match flistxattr(file.as_fd(), list.as_mut_slice()) {
            Err(Errno::NOTSUP) => return Ok(()),
            counted => counted?,
        };
        let mut records = Vec::new();
        for name in list[..count].split(|byte| *byte == 0) {
            let Ok(name) = std::str::from_utf8(name) else { continue };
            if !KEPT_XATTRS.iter().any(|kept| name.starts_with(kept)) {
                continue;
            }
            let mut value = vec![0; MAX_XATTR];
            let length = fgetxattr(file, name, value.as_mut_slice())?;
            value.truncate(length);
            records.push((format!("{XATTR}{name}"), value));
        }
        if records.is_empty() {
            return Ok(());
        }
        self.archive
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }
}

/// Whether a directory of an overlay hides the one below it.
fn is_opaque(dir: &OwnedFd) -> bool {
    let mut mark = [0; 1];
    fgetxattr(dir, OPAQUE_XATTR, &mut mark).is_ok() && mark == *b"y"
}

fn header(stat: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// The names in a directory in their order, so that the same files make the same archive.
fn names(dir: &OwnedFd) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort();
    Ok(names)
}
