//! Makes the metadata of an EROFS file system with one directory of files. The files' bytes are not part of
//! it: they follow the metadata, each file in blocks of its own, and can be served from elsewhere. So a disk
//! with any files is made without reading or copying them.
//!
//! ```text
//!   block 0         superblock, at byte 1024
//!   from block 1    inodes: the root directory's, then the files'
//!   then            the directory's entries; from there on the files' bytes
//! ```
//! mkfs.erofs and the crates that write EROFS would copy the files' bytes. Source: Linux,
//! Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h; only extended inodes with the flat layout are
//! used.

/// Size of a block, bytes.
pub(super) const BLOCK: usize = 4096;

const BLOCK_BITS: u8 = 12;
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Inode numbers count units of 32 bytes; an extended inode takes two of them.
const PLACE: usize = 32;
const INODE: usize = 64;
/// Number of the root inode; the inodes start with block 1.
const ROOT: u64 = (BLOCK / PLACE) as u64;
const EXTENDED: u16 = 1;
const ENTRY: usize = 12;
const REGULAR: u8 = 1;
const DIRECTORY: u8 = 2;

/// The metadata, and the offsets of the files' bytes.
#[derive(Debug)]
pub(super) struct Layout {
    /// A whole number of blocks.
    pub(super) metadata: Vec<u8>,
    /// Offset of each file, bytes.
    pub(super) offsets: Vec<u64>,
    /// Size of the whole file system, bytes.
    pub(super) size: u64,
}

/// Lays out files with these names, each a single path element, and sizes. Returns None if they exceed
/// EROFS's limit of 16 TiB.
pub(super) fn layout(files: &[(&str, u64)]) -> Option<Layout> {
    let entries = entries(files);
    let inodes = BLOCK + ((1 + files.len()) * INODE).next_multiple_of(BLOCK);
    let mut next = (inodes + entries.len().next_multiple_of(BLOCK)) as u64;
    let mut offsets = Vec::new();
    for (_, size) in files {
        offsets.push(next);
        next = next.checked_add(size.checked_next_multiple_of(BLOCK as u64)?)?;
    }
    u32::try_from(next / BLOCK as u64).ok()?;

    let mut metadata = vec![0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| metadata[SUPERBLOCK + at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC.to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &(ROOT as u16).to_le_bytes());
    put(16, &(1 + files.len() as u64).to_le_bytes());
    put(36, &block(next));
    let directory =
        ErofsInode { number: 1, mode: libc::S_IFDIR | 0o500, links: 2, size: entries.len() as u64 };
    directory.write(inodes as u64, &mut metadata);
    for (index, ((_, size), offset)) in files.iter().zip(&offsets).enumerate() {
        let file =
            ErofsInode { number: index as u32 + 2, mode: libc::S_IFREG | 0o400, links: 1, size: *size };
        file.write(*offset, &mut metadata);
    }
    metadata.resize(inodes, 0);
    metadata.extend(entries);
    metadata.resize(metadata.len().next_multiple_of(BLOCK), 0);
    Some(Layout { metadata, offsets, size: next })
}

fn block(offset: u64) -> [u8; 4] {
    ((offset / BLOCK as u64) as u32).to_le_bytes()
}

struct ErofsInode {
    number: u32,
    mode: u32,
    links: u32,
    size: u64,
}

impl ErofsInode {
    /// Writes a `struct erofs_inode_extended`; owner and times are 0.
    fn write(&self, offset: u64, to: &mut Vec<u8>) {
        let start = to.len();
        to.extend(EXTENDED.to_le_bytes());
        to.extend([0; 2]);
        to.extend((self.mode as u16).to_le_bytes());
        to.extend([0; 2]);
        to.extend(self.size.to_le_bytes());
        to.extend(block(offset));
        to.extend(self.number.to_le_bytes());
        to.extend([0; 20]);
        to.extend(self.links.to_le_bytes());
        to.resize(start + INODE, 0);
    }
}

/// Returns the directory's content: blocks with entries followed by their names, sorted by the names' bytes.
fn entries(files: &[(&str, u64)]) -> Vec<u8> {
    let number = |index: usize| ROOT + ((1 + index) * (INODE / PLACE)) as u64;
    let named = files.iter().enumerate().map(|(index, (name, _))| (*name, number(index), REGULAR));
    let mut all: Vec<_> =
        [(".", ROOT, DIRECTORY), ("..", ROOT, DIRECTORY)].into_iter().chain(named).collect();
    all.sort_unstable();
    let mut content = Vec::new();
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let mut room = BLOCK;
        let fit = rest.iter().take_while(|(name, ..)| {
            let taken = ENTRY + name.len();
            let fits = taken <= room;
            room = room.saturating_sub(taken);
            fits
        });
        let (these, others) = rest.split_at(fit.count());
        // All blocks before this one are full.
        content.resize(content.len().next_multiple_of(BLOCK), 0);
        let mut name_at = these.len() * ENTRY;
        for (name, inode, kind) in these {
            content.extend(inode.to_le_bytes());
            content.extend((name_at as u16).to_le_bytes());
            content.extend([*kind, 0]);
            name_at += name.len();
        }
        these.iter().for_each(|(name, ..)| content.extend(name.as_bytes()));
        rest = others;
    }
    content
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt as _, process::Command};

    use super::*;

    /// Compares with erofs-utils.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test waits for it at once")]
    fn fsck_finds_each_file_with_its_bytes() {
        // These have more than a block of entries, names that sort before ".", an empty file, and files that
        // fill their blocks.
        let mut files: Vec<_> =
            (0..700).map(|number| (format!("core-{number}.img"), number % 9 * 1024)).collect();
        files.extend([("-x".to_owned(), 1), ("a".repeat(255), 8192), ("empty".to_owned(), 0)]);
        let dir = tempfile::tempdir().unwrap();
        let (image, tree) = (dir.path().join("image"), dir.path().join("tree"));
        let named: Vec<_> = files.iter().map(|(name, size)| (name.as_str(), *size)).collect();
        let layout = layout(&named).unwrap();
        let file = fs::File::create(&image).unwrap();
        file.set_len(layout.size).unwrap();
        file.write_all_at(&layout.metadata, 0).unwrap();
        let content = |name: &str, size: u64| name.bytes().cycle().take(size as usize).collect::<Vec<u8>>();
        for ((name, size), offset) in named.iter().zip(&layout.offsets) {
            file.write_all_at(&content(name, *size), *offset).unwrap();
        }
        let fsck = Command::new("fsck.erofs")
            .arg(format!("--extract={}", tree.display()))
            .arg(&image)
            .output()
            .expect("fsck.erofs, of erofs-utils");
        assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
        assert_eq!(fs::read_dir(&tree).unwrap().count(), files.len());
        for (name, size) in named {
            assert!(fs::read(tree.join(name)).unwrap() == content(name, size), "{name}");
        }
    }

    #[test]
    fn files_that_exceed_the_format_are_refused() {
        assert!(layout(&[("a", 15 << 40)]).is_some());
        for size in [16 << 40, u64::MAX - 5000, u64::MAX] {
            assert!(layout(&[("a", size)]).is_none(), "{size}");
        }
        assert!(layout(&[("a", u64::MAX / 2), ("b", u64::MAX / 2)]).is_none());
    }
}
