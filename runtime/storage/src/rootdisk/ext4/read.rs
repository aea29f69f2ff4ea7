//! Reads a disk back into the manifest that its key is the digest of.

use std::{collections::HashMap, fs::File};

use super::{BLOCK, Ext4Error, ROOT, damaged, image::Ext4Image, inode::Ext4Inode};
use crate::rootdisk::{
    file_digest::FileDigest,
    key::RootdiskKey,
    manifest::{FileKind, FileRecord, RecordData, TreeManifest},
};

/// Deepest directory that is followed; a path of more names is longer than PATH_MAX.
const MAX_DEPTH: usize = 2048;
/// Blocks that are read at once.
const CHUNK: u64 = 64;

/// The key of the tree that is on the disk: equal to its name in the cache if nothing on it was changed.
///
/// # Errors
/// The disk cannot be read or is malformed.
pub(in crate::rootdisk) fn manifest(file: &File) -> Result<RootdiskKey, Ext4Error> {
    let mut image = Ext4Image::open(file)?;
    let mut manifest = TreeManifest::new(image.size());
    let mut seen: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut buffer = vec![0; CHUNK as usize * BLOCK];
    let mut pending = vec![(Vec::new(), ROOT, 0)];
    while let Some((path, ino, depth)) = pending.pop() {
        let inode = image.inode(ino)?;
        let kind = FileKind::of(inode.mode()).ok_or_else(|| damaged(format!("inode {ino} has no type")))?;
        if kind.may_be_linked() && inode.links() > 1 {
            if let Some(first) = seen.get(&ino) {
                manifest.add_link(&path, first);
                continue;
            }
            seen.insert(ino, path.clone());
        }
        let target;
        let node = match kind {
            FileKind::Directory if depth > MAX_DEPTH => return Err(damaged("its directories are too deep")),
            FileKind::Directory => RecordData::Other,
            FileKind::File => {
                RecordData::File { size: inode.size(), content: image.content(&inode, &mut buffer)? }
            }
            FileKind::Symlink => {
                target = image.target(&inode)?;
                RecordData::Symlink { target: &target }
            }
            FileKind::Character | FileKind::Block => RecordData::Device { number: inode.device() },
            FileKind::Fifo | FileKind::Socket => RecordData::Other,
        };
        let xattrs = image.xattrs(&inode)?;
        manifest.add(&FileRecord {
            path: &path,
            kind,
            mode: (inode.mode() & 0o7777) as u16,
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: inode.mtime(),
            xattrs: &xattrs,
            node,
        });
        if kind == FileKind::Directory {
            let mut children = image.directory(&inode)?;
            // The last one is visited first.
            children.sort_by(|a, b| b.name.cmp(&a.name));
            for child in children {
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                pending.push(([&path, slash, &child.name].concat(), child.ino, depth + 1));
            }
        }
    }
    Ok(manifest.finish())
}

impl Ext4Image<'_> {
    fn content(&mut self, inode: &Ext4Inode, buffer: &mut [u8]) -> Result<[u8; 32], Ext4Error> {
        let mut content = FileDigest::new();
        for extent in self.extents(inode)? {
            let mut done = 0;
            while done < extent.blocks {
                let offset = (extent.logical + done) * BLOCK as u64;
                let blocks = CHUNK.min(extent.blocks - done);
                let length = inode.size().saturating_sub(offset).min(blocks * BLOCK as u64) as usize;
                self.read(extent.physical + done, &mut buffer[..length])?;
                content.update(offset, &buffer[..length]);
                done += blocks;
            }
        }
        Ok(content.finish())
    }

    fn target(&mut self, inode: &Ext4Inode) -> Result<Vec<u8>, Ext4Error> {
        let length = inode.size() as usize;
        if !inode.has_extents() {
            let target = inode.area().get(..length);
            return Ok(target.ok_or_else(|| damaged("a symbolic link is too long"))?.to_vec());
        }
        let first = self.extents(inode)?.first().map(|extent| extent.physical);
        match first {
            Some(block) if length < BLOCK => Ok(self.block(block)?[..length].to_vec()),
            _ => Err(damaged("a symbolic link has no target")),
        }
    }
}
