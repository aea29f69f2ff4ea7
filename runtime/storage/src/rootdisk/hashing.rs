//! Computes the key of a tree. All contents and extended attributes are read for it.

use std::{fs::File, os::unix::fs::FileExt as _};

use rustix::{
    fs::{SeekFrom, fgetxattr, flistxattr, fstat, lgetxattr, llistxattr, seek},
    io::Errno,
};

use super::{
    RootdiskError,
    file_digest::FileDigest,
    key::RootdiskKey,
    manifest::{FileKind, FileRecord, RecordData, TreeManifest, Xattrs},
    source_mount::{SourceMount, open_in},
    tree::{SourceTree, TreeEntry, lossy},
};

/// Bytes read at once; a multiple of the block size.
const BUFFER: usize = 256 << 10;
/// The kernel's limit of a list of attribute names, and of an attribute's value.
const XATTR_MAX: usize = 64 << 10;

/// What reading a whole tree has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HashedTree {
    /// The key of the disk that is made of the tree.
    pub(super) key: RootdiskKey,
    /// Some file has attributes `trusted.*`, which only a privileged process can read (xattr(7)).
    pub(super) has_trusted: bool,
}

/// Reads the tree of a disk of `disk_size` bytes. `done` is called with the number of bytes of each file that was
/// read.
///
/// # Errors
/// A file cannot be read, or its size is not what the walk saw.
pub(super) fn hash(
    mount: &SourceMount,
    tree: &SourceTree,
    disk_size: u64,
    mut done: impl FnMut(u64),
) -> Result<HashedTree, RootdiskError> {
    let mut has_trusted = false;
    let mut manifest = TreeManifest::new(disk_size);
    let mut buffer = vec![0; BUFFER];
    // The directory of the last entry: most of the next ones are in it too.
    let mut dir = (Vec::new(), mount.open(b"")?);
    for entry in &tree.entries {
        if let Some(first) = entry.first {
            manifest.add_link(&entry.path, &tree.entries[first].path);
            continue;
        }
        let parent = entry.parent().strip_suffix(b"/").unwrap_or_default();
        if dir.0 != parent {
            dir = (parent.to_vec(), mount.open(parent)?);
        }
        let open = || {
            let name = if entry.path.is_empty() { b"." } else { entry.name() };
            open_in(&dir.1, name).map_err(|error| mount.error("open", &entry.path, error))
        };
        let (xattrs, node) = match entry.kind {
            FileKind::File => {
                let file = File::from(open()?);
                let content = content(mount, entry, &file, &mut buffer)?;
                done(entry.size);
                (
                    xattrs(mount, entry, Some(&file), &mut buffer)?,
                    RecordData::File { size: entry.size, content },
                )
            }
            FileKind::Directory => {
                (xattrs(mount, entry, Some(&open()?.into()), &mut buffer)?, RecordData::Other)
            }
            FileKind::Symlink => {
                (xattrs(mount, entry, None, &mut buffer)?, RecordData::Symlink { target: &entry.target })
            }
            FileKind::Character | FileKind::Block => {
                (xattrs(mount, entry, None, &mut buffer)?, RecordData::Device { number: entry.rdev })
            }
            FileKind::Fifo | FileKind::Socket => {
                (xattrs(mount, entry, None, &mut buffer)?, RecordData::Other)
            }
        };
        has_trusted |= xattrs.iter().any(|(name, _)| name.starts_with(b"trusted."));
        manifest.add(&FileRecord {
            path: &entry.path,
            kind: entry.kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: &xattrs,
            node,
        });
    }
    Ok(HashedTree { key: manifest.finish(), has_trusted })
}

fn content(
    mount: &SourceMount,
    entry: &TreeEntry,
    file: &File,
    buffer: &mut [u8],
) -> Result<[u8; 32], RootdiskError> {
    let mut content = FileDigest::new();
    let failed = |source| mount.error("read", &entry.path, source);
    let stat = fstat(file).map_err(|error| failed(error.into()))?;
    if FileKind::of(stat.st_mode) != Some(FileKind::File) || stat.st_size as u64 != entry.size {
        return Err(RootdiskError::Changed { path: lossy(&entry.path) });
    }
    let sparse = entry.allocated < entry.size;
    let mut offset = 0;
    while offset < entry.size {
        if sparse {
            match seek(file, SeekFrom::Data(offset)) {
                // Rounded down to the start of the block; the bytes before the data read as zeros.
                Ok(data) => offset = data - data % super::ext4::BLOCK as u64,
                Err(Errno::NXIO) => break,
                Err(error) => return Err(failed(error.into())),
            }
        }
        let length = (entry.size - offset).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..length], offset).map_err(failed)?;
        content.update(offset, &buffer[..length]);
        offset += length as u64;
    }
    Ok(content.finish())
}

/// Reads the extended attributes of the open file, or by its path if opening it would have side effects.
fn xattrs(
    mount: &SourceMount,
    entry: &TreeEntry,
    file: Option<&File>,
    buffer: &mut [u8],
) -> Result<Xattrs, RootdiskError> {
    let path = if file.is_none() { mount.path_of(&entry.path) } else { Vec::new() };
    let failed = |error: Errno| mount.error("read the extended attributes of", &entry.path, error);
    let (names, values) = buffer.split_at_mut(XATTR_MAX);
    let listed = match file {
        Some(file) => flistxattr(file, &mut *names),
        None => llistxattr(&path[..], &mut *names),
    };
    let length = match listed {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let values = &mut values[..XATTR_MAX];
        let read = match file {
            Some(file) => fgetxattr(file, name, &mut *values),
            None => lgetxattr(&path[..], name, &mut *values),
        };
        let length = read.map_err(failed)?;
        found.push((name.to_vec(), values[..length].to_vec()));
    }
    found.sort();
    Ok(found)
}
