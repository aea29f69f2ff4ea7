//! A walk over a root file system: everything that stat(2) reports, in a fixed order.

use std::{collections::HashMap, ffi::CStr};

use rustix::fs::{AtFlags, Dir, Stat, major, minor, readlinkat, statat};
use sha2::{Digest as _, Sha256};

use super::{
    RootdiskError,
    ext4::{BLOCK, INODE},
    key::RootdiskKey,
    manifest::{Ext4Time, FileKind},
    source_mount::SourceMount,
};

/// Longest path, in bytes, that can be reached from outside of the container.
const PATH_LIMIT: usize = 4000;

/// All files below a root, directories before what is in them, the names of a directory sorted by their
/// bytes.
#[derive(Debug)]
pub(crate) struct SourceTree {
    /// The first is the root, with an empty path.
    pub(super) entries: Vec<TreeEntry>,
}

/// One name in the tree.
#[derive(Debug)]
pub(crate) struct TreeEntry {
    /// From the root, without a leading slash.
    pub(super) path: Box<[u8]>,
    /// How many directories lead to it; 0 for the root.
    pub(super) depth: usize,
    /// Index of the entry that is the first name of the same file.
    pub(super) first: Option<usize>,
    pub(super) kind: FileKind,
    /// Permissions with setuid, setgid and sticky bit.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Ext4Time,
    /// Bytes of a regular file's content, else 0.
    pub(super) size: u64,
    /// Bytes that the source uses for it.
    pub(super) allocated: u64,
    /// Major and minor number of a device.
    pub(super) rdev: (u32, u32),
    /// Of a symbolic link.
    pub(super) target: Box<[u8]>,
    identity: InodeIdentity,
}

/// Distinguishes the file from all others, and its state from all other states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InodeIdentity {
    device: u64,
    inode: u64,
    links: u64,
    ctime: (i64, u64),
}

impl TreeEntry {
    pub(super) fn name(&self) -> &[u8] {
        self.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }

    /// The path of the directory that it is in.
    pub(super) fn parent(&self) -> &[u8] {
        &self.path[..self.path.len() - self.name().len()]
    }

    fn new(path: Vec<u8>, depth: usize, stat: &Stat, target: Vec<u8>) -> Result<Self, RootdiskError> {
        let kind = FileKind::of(stat.st_mode).ok_or_else(|| RootdiskError::Kind { path: lossy(&path) })?;
        let device = matches!(kind, FileKind::Character | FileKind::Block);
        Ok(Self {
            path: path.into(),
            depth,
            first: None,
            kind,
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Ext4Time::clamped(stat.st_mtime, stat.st_mtime_nsec as u32),
            size: if kind == FileKind::File { stat.st_size as u64 } else { 0 },
            allocated: stat.st_blocks as u64 * 512,
            rdev: if device { (major(stat.st_rdev), minor(stat.st_rdev)) } else { (0, 0) },
            target: target.into(),
            identity: InodeIdentity {
                device: stat.st_dev,
                inode: stat.st_ino,
                links: stat.st_nlink,
                ctime: (stat.st_ctime, stat.st_ctime_nsec),
            },
        })
    }
}

impl SourceTree {
    /// # Errors
    /// A file cannot be examined; the error names its path.
    pub(crate) fn walk(mount: &SourceMount) -> Result<Self, RootdiskError> {
        let stat =
            statat(mount, c".", AtFlags::empty()).map_err(|error| mount.error("examine", b"", error))?;
        let mut entries: Vec<TreeEntry> = Vec::new();
        let mut seen = HashMap::new();
        // A stack: the last entry is the next one to visit.
        let mut pending = vec![TreeEntry::new(Vec::new(), 0, &stat, Vec::new())?];
        while let Some(mut entry) = pending.pop() {
            if entry.kind.may_be_linked() && entry.identity.links > 1 {
                let InodeIdentity { device, inode, .. } = entry.identity;
                let first = *seen.entry((device, inode)).or_insert(entries.len());
                entry.first = (first != entries.len()).then_some(first);
            }
            if entry.kind == FileKind::Directory {
                let from = pending.len();
                list(mount, &entry, &mut pending)?;
                pending[from..].sort_by(|a, b| b.path.cmp(&a.path));
            }
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// Checks that a later walk found the same files in the same states. Nothing is read again.
    pub(super) fn unchanged(&self, later: &Self) -> Result<(), RootdiskError> {
        let same =
            |a: &TreeEntry, b: &TreeEntry| a.path == b.path && a.identity == b.identity && a.size == b.size;
        let pairs = self.entries.iter().zip(&later.entries);
        let changed = pairs.clone().find(|(a, b)| !same(a, b)).map(|(a, _)| a);
        match changed
            .or_else(|| self.entries.get(later.entries.len()))
            .or_else(|| later.entries.get(self.entries.len()))
        {
            Some(entry) => Err(RootdiskError::Changed { path: lossy(&entry.path) }),
            None => Ok(()),
        }
    }

    /// Identifies this state of these files on this machine. It changes with every change that the kernel
    /// records.
    pub(super) fn identity(&self) -> RootdiskKey {
        self.digest(true)
    }

    /// Identifies the tree without its contents and attributes. Trees of different shapes have different
    /// keys.
    pub(super) fn shape(&self) -> RootdiskKey {
        self.digest(false)
    }

    fn digest(&self, with_identity: bool) -> RootdiskKey {
        let mut digest = Sha256::new();
        for entry in &self.entries {
            for bytes in [&entry.path, &entry.target] {
                digest.update((bytes.len() as u64).to_le_bytes());
                digest.update(bytes);
            }
            let first = entry.first.map_or(u64::MAX, |first| first as u64);
            let numbers =
                [entry.kind as u64, entry.mode.into(), entry.uid.into(), entry.gid.into(), entry.size, first];
            numbers.iter().for_each(|number| digest.update(number.to_le_bytes()));
            digest.update(entry.rdev.0.to_le_bytes());
            digest.update(entry.rdev.1.to_le_bytes());
            if with_identity || !entry.path.is_empty() {
                digest.update(entry.mtime.seconds.to_le_bytes());
                digest.update(entry.mtime.nanoseconds.to_le_bytes());
            }
            if with_identity {
                let InodeIdentity { device, inode, links, ctime } = entry.identity;
                [device, inode, links, ctime.0 as u64, ctime.1]
                    .iter()
                    .for_each(|number| digest.update(number.to_le_bytes()));
            }
        }
        RootdiskKey::new(digest.finalize().into())
    }

    /// The entries for which mke2fs makes an inode: files under their first name, and symbolic links under
    /// each name, because mke2fs copies them once for each.
    pub(crate) fn files(&self) -> impl Iterator<Item = &TreeEntry> {
        self.entries.iter().filter(|entry| entry.first.is_none() || entry.kind == FileKind::Symlink)
    }

    /// Bytes of all regular files.
    pub(super) fn content_bytes(&self) -> u64 {
        self.files().map(|entry| entry.size).sum()
    }

    /// Bytes that the tree takes on a disk without holes: files in whole blocks, inodes and directories.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.files().map(|entry| own_bytes(entry, entry.size)).sum()
    }

    /// Bytes that a disk of the tree will use, as far as is known without reading the tree.
    pub(crate) fn needed_bytes(&self) -> u64 {
        self.files().map(|entry| own_bytes(entry, entry.size.min(entry.allocated))).sum()
    }

    pub(super) fn has_lost_found(&self) -> bool {
        self.entries.iter().any(|entry| &*entry.path == b"lost+found")
    }
}

fn own_bytes(entry: &TreeEntry, content: u64) -> u64 {
    let block = BLOCK as u64;
    let data = match entry.kind {
        FileKind::Directory | FileKind::Symlink => block,
        _ => content.next_multiple_of(block),
    };
    data + INODE as u64
}

fn list(mount: &SourceMount, dir: &TreeEntry, found: &mut Vec<TreeEntry>) -> Result<(), RootdiskError> {
    let failed = |error| mount.error("list", &dir.path, error);
    let fd = mount.open(&dir.path)?;
    for item in Dir::read_from(&fd).map_err(failed)? {
        let item = item.map_err(failed)?;
        let name: &CStr = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let slash: &[u8] = if dir.path.is_empty() { b"" } else { b"/" };
        let path = [&dir.path, slash, name.to_bytes()].concat();
        if path.len() > PATH_LIMIT {
            return Err(RootdiskError::PathTooLong { path: lossy(&path), limit: PATH_LIMIT });
        }
        let examined = |error| mount.error("examine", &path, error);
        let stat = statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW).map_err(examined)?;
        let target = match FileKind::of(stat.st_mode) {
            Some(FileKind::Symlink) => readlinkat(&fd, name, Vec::new()).map_err(examined)?.into_bytes(),
            _ => Vec::new(),
        };
        found.push(TreeEntry::new(path, dir.depth + 1, &stat, target)?);
    }
    Ok(())
}

/// A path of the tree for messages.
pub(super) fn lossy(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}
