//! Makes what mke2fs wrote a function of the tree alone, and checks it against the tree.
//!
//! mke2fs copies the times of access and change, places extended attributes in the source's order, drops the
//! nanoseconds of modification times, gives the root directory a mode of its own, makes a lost+found and
//! copies a symbolic link once for each of its names. All of that is corrected here; sizes, owners, modes and
//! hard links are compared with what the walk saw.

use std::{collections::HashMap, fs::File};

use super::{Ext4Error, ROOT, image::Ext4Image, inode::Ext4Inode, lost_found, put32};
use crate::rootdisk::{
    manifest::{Ext4Time, FileKind},
    tree::{SourceTree, TreeEntry},
};

/// The time of the root directory and of the file system itself, because their own times depend on when the
/// image was unpacked.
const EPOCH: Ext4Time = Ext4Time { seconds: 0, nanoseconds: 0 };

/// What to do with an overlay's marks of origin, which name the lower file that another file was copied from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OriginMarks {
    Kept,
    /// The marks refer to a file system of the host. In the guest they would hide files of the lower layer.
    Dropped,
    /// As Dropped, of an upper directory of an ordinary user, where all marks are user attributes (`userxattr` in
    /// Documentation/filesystems/overlayfs.rst). That of an opaque directory becomes the one that the guest's overlay reads.
    DroppedOfUser,
}

/// Sets the UUID of a disk, which is part of the handles of its files (name_to_handle_at(2)).
///
/// # Errors
/// The disk cannot be read or written.
pub(in crate::rootdisk) fn set_uuid(file: &File, uuid: [u8; 16]) -> Result<(), Ext4Error> {
    /// The offset in the superblock.
    const S_UUID: usize = 0x68;
    let mut image = Ext4Image::open(file)?;
    image.superblock()?[S_UUID..S_UUID + uuid.len()].copy_from_slice(&uuid);
    image.flush()
}

/// Normalises the disk in `file` that was made of `tree`.
///
/// # Errors
/// The disk cannot be read or written, or does not hold the tree.
pub(crate) fn normalise(file: &File, tree: &SourceTree, marks: OriginMarks) -> Result<(), Ext4Error> {
    let mut image = Ext4Image::open(file)?;
    let mut names = vec![1_u64; tree.entries.len()];
    tree.entries.iter().filter_map(|entry| entry.first).for_each(|first| names[first] += 1);
    let mut inodes = vec![0; tree.entries.len()];
    let mut open: Vec<OpenDirectory> = Vec::new();
    for (index, entry) in tree.entries.iter().enumerate() {
        let ino = if index == 0 {
            ROOT
        } else {
            close(&mut open, entry.depth, tree, index)?;
            let found = open.last_mut().and_then(|dir| dir.names.remove(entry.name()));
            found.ok_or_else(|| differs(entry, "it is missing"))?
        };
        inodes[index] = ino;
        let mut inode = image.inode(ino)?;
        if let Some(first) = entry.first {
            match (entry.kind, open.last()) {
                _ if inodes[first] == ino => {}
                (FileKind::Symlink, Some(dir)) => {
                    compare(entry, 1, &inode)?;
                    image.relink(dir.ino, entry.name(), ino, inodes[first])?;
                }
                _ => return Err(differs(entry, "it is not a hard link")),
            }
            continue;
        }
        if entry.kind == FileKind::Symlink && inode.links() == 1 {
            // The copies under its other names are removed when these are visited.
            let all = u16::try_from(names[index]).map_err(|_| differs(entry, "it has too many names"))?;
            inode.set_links(all);
        }
        if index == 0 {
            inode.set_permissions(entry.mode);
            inode.set_owner(entry.uid, entry.gid);
        }
        compare(entry, names[index], &inode)?;
        inode.set_times(if index == 0 { EPOCH } else { entry.mtime });
        inode.clear_incidentals();
        image.sort_xattrs(&mut inode, &entry.path, marks)?;
        image.put_inode(ino, &inode)?;
        if entry.kind == FileKind::Directory {
            let names: HashMap<_, _> =
                image.directory(&inode)?.into_iter().map(|found| (found.name, found.ino)).collect();
            open.push(OpenDirectory { ino, names });
            if index == 0 && !tree.has_lost_found() {
                let ino = open[0].names.remove(lost_found::NAME);
                image.remove_lost_found(ino.ok_or_else(|| differs(entry, "it has no lost+found"))?)?;
            }
        }
    }
    close(&mut open, 0, tree, 0)?;
    clear_times(&mut image)?;
    image.flush()
}

/// Clears the times of the reserved inodes and of the file system itself.
fn clear_times(image: &mut Ext4Image<'_>) -> Result<(), Ext4Error> {
    for ino in (1..11).filter(|&ino| ino != ROOT) {
        let mut inode = image.inode(ino)?;
        inode.set_times(EPOCH);
        image.put_inode(ino, &inode)?;
    }
    let superblock = image.superblock()?;
    // s_wtime, s_lastcheck, s_mkfs_time, their high bytes, s_kbytes_written.
    for at in [0x30, 0x40, 0x108, 0x178, 0x17c, 0x274] {
        put32(superblock, at, 0);
    }
    Ok(())
}

/// A directory on the way to the current entry.
struct OpenDirectory {
    ino: u32,
    /// The names in it that have not been visited yet.
    names: HashMap<Vec<u8>, u32>,
}

/// Leaves directories until `depth` is the number of open ones; every name in them must have been visited.
fn close(open: &mut Vec<OpenDirectory>, depth: usize, tree: &SourceTree, at: usize) -> Result<(), Ext4Error> {
    while open.len() > depth {
        if let Some(name) = open.pop().and_then(|dir| dir.names.into_keys().next()) {
            let what =
                format!("it has a name {:?} that the source does not have", String::from_utf8_lossy(&name));
            return Err(differs(&tree.entries[at], &what));
        }
    }
    Ok(())
}

/// Checks that the inode is what the walk saw. `names` is the number of the file's names that the walk saw.
fn compare(entry: &TreeEntry, names: u64, inode: &Ext4Inode) -> Result<(), Ext4Error> {
    let check = |same: bool, what: &str| if same { Ok(()) } else { Err(differs(entry, what)) };
    check(inode.mode() == u32::from(entry.mode) | entry.kind.mode(), "type or mode")?;
    check((inode.uid(), inode.gid()) == (entry.uid, entry.gid), "owner")?;
    // More links than ext4 can count are not a change of the source, but the disk is wrong nevertheless.
    check(entry.kind == FileKind::Directory || u64::from(inode.links()) == names, "number of hard links")?;
    match entry.kind {
        FileKind::File => check(inode.size() == entry.size, "size"),
        FileKind::Symlink => check(inode.size() == entry.target.len() as u64, "target"),
        FileKind::Character | FileKind::Block => check(inode.device() == entry.rdev, "device number"),
        FileKind::Directory | FileKind::Fifo | FileKind::Socket => Ok(()),
    }
}

fn differs(entry: &TreeEntry, what: &str) -> Ext4Error {
    let path = format!("/{}", String::from_utf8_lossy(&entry.path));
    Ext4Error::Differs { path, what: what.to_owned() }
}
