//! A disk's superblock, group descriptors and blocks.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt as _};

use super::{BLOCK, Ext4Error, INODE, damaged, inode::Ext4Inode, put16, put32, u16_at, u32_at};

/// Blocks that are kept in memory before they are written back and dropped (64 MiB).
const CACHED: usize = 16384;
const GROUP_DESCRIPTOR: usize = 32;
/// Byte of the superblock in block 0.
const SUPERBLOCK: usize = 1024;

/// filetype, extent, flex_bg.
const INCOMPAT: u32 = 0x2 | 0x40 | 0x200;
/// has_journal, ext_attr, dir_index.
const COMPAT: u32 = 0x4 | 0x8 | 0x20;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40;

/// An open disk. Changes are in memory until [`Ext4Image::flush`].
pub(super) struct Ext4Image<'a> {
    file: &'a File,
    blocks: u64,
    inodes: u32,
    inodes_per_group: u32,
    blocks_per_group: u32,
    groups: u32,
    cache: BTreeMap<u64, Cached>,
}

struct Cached {
    bytes: Box<[u8; BLOCK]>,
    dirty: bool,
}

/// Counters of a block group, as they are in its descriptor.
#[derive(Clone, Copy)]
pub(super) enum Counter {
    FreeBlocks = 12,
    FreeInodes = 14,
    Directories = 16,
}

impl<'a> Ext4Image<'a> {
    /// # Errors
    /// The disk is not ext4, or has other features than those that machinen asks mke2fs for.
    pub(super) fn open(file: &'a File) -> Result<Self, Ext4Error> {
        let mut first = [0; BLOCK];
        file.read_exact_at(&mut first, 0).map_err(|source| Ext4Error::Read { block: 0, source })?;
        let sb = &first[SUPERBLOCK..2 * SUPERBLOCK];
        if u16_at(sb, 0x38) != 0xef53 {
            return Err(damaged("it has no ext4 superblock"));
        }
        let (compat, incompat, ro) = (u32_at(sb, 0x5c), u32_at(sb, 0x60), u32_at(sb, 0x64));
        if incompat != INCOMPAT || compat & !COMPAT != 0 || ro & !RO_COMPAT != 0 {
            let what = format!("unexpected ext4 features {compat:#x}/{incompat:#x}/{ro:#x}");
            return Err(Ext4Error::Unsupported { what });
        }
        let sizes = (u32_at(sb, 0x18), u16_at(sb, 0x58));
        if sizes != (2, INODE as u16) {
            let what = format!("blocks of 2^{} and inodes of {} bytes", sizes.0.saturating_add(10), sizes.1);
            return Err(Ext4Error::Unsupported { what });
        }
        let mut image = Self {
            file,
            blocks: u32_at(sb, 4).into(),
            inodes: u32_at(sb, 0),
            inodes_per_group: u32_at(sb, 0x28),
            blocks_per_group: u32_at(sb, 0x20),
            groups: 0,
            cache: BTreeMap::new(),
        };
        if image.inodes_per_group == 0 || image.blocks_per_group != 8 * BLOCK as u32 || image.blocks == 0 {
            return Err(damaged("its superblock has impossible group sizes"));
        }
        image.groups = image.blocks.div_ceil(image.blocks_per_group.into()) as u32;
        if u64::from(image.groups) * u64::from(image.inodes_per_group) != u64::from(image.inodes) {
            return Err(damaged("its superblock has an impossible number of inodes"));
        }
        Ok(image)
    }

    /// Bytes of the file system.
    pub(super) fn size(&self) -> u64 {
        self.blocks * BLOCK as u64
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(super) fn blocks_per_group(&self) -> u32 {
        self.blocks_per_group
    }

    pub(super) fn inodes_per_group(&self) -> u32 {
        self.inodes_per_group
    }

    pub(super) fn block(&mut self, block: u64) -> Result<&[u8; BLOCK], Ext4Error> {
        Ok(&self.cached(block)?.bytes)
    }

    /// Like [`Ext4Image::block`], and [`Ext4Image::flush`] will write it.
    pub(super) fn block_mut(&mut self, block: u64) -> Result<&mut [u8; BLOCK], Ext4Error> {
        let cached = self.cached(block)?;
        cached.dirty = true;
        Ok(&mut cached.bytes)
    }

    /// Reads blocks of a file's content without keeping them.
    pub(super) fn read(&self, block: u64, buffer: &mut [u8]) -> Result<(), Ext4Error> {
        self.file
            .read_exact_at(buffer, block * BLOCK as u64)
            .map_err(|source| Ext4Error::Read { block, source })
    }

    pub(super) fn superblock(&mut self) -> Result<&mut [u8], Ext4Error> {
        Ok(&mut self.block_mut(0)?[SUPERBLOCK..2 * SUPERBLOCK])
    }

    pub(super) fn inode(&mut self, ino: u32) -> Result<Ext4Inode, Ext4Error> {
        let (block, at) = self.locate(ino)?;
        let bytes = &self.block(block)?[at..at + INODE];
        Ok(Ext4Inode::new(bytes.try_into().expect("the slice is as long as an inode")))
    }

    pub(super) fn put_inode(&mut self, ino: u32, inode: &Ext4Inode) -> Result<(), Ext4Error> {
        let (block, at) = self.locate(ino)?;
        self.block_mut(block)?[at..at + INODE].copy_from_slice(inode.bytes());
        Ok(())
    }

    fn locate(&mut self, ino: u32) -> Result<(u64, usize), Ext4Error> {
        if ino == 0 || ino > self.inodes {
            return Err(damaged(format!("there is no inode {ino}")));
        }
        let (group, index) = ((ino - 1) / self.inodes_per_group, (ino - 1) % self.inodes_per_group);
        let table = self.pointer(group, 8)?;
        let byte = index as usize * INODE;
        Ok((table + (byte / BLOCK) as u64, byte % BLOCK))
    }

    /// The bitmap of the group's blocks or inodes.
    pub(super) fn block_bitmap(&mut self, group: u32) -> Result<&mut [u8; BLOCK], Ext4Error> {
        let block = self.pointer(group, 0)?;
        self.block_mut(block)
    }

    pub(super) fn inode_bitmap(&mut self, group: u32) -> Result<&mut [u8; BLOCK], Ext4Error> {
        let block = self.pointer(group, 4)?;
        self.block_mut(block)
    }

    pub(super) fn count(&mut self, group: u32, counter: Counter, by: i32) -> Result<(), Ext4Error> {
        let (block, at) = self.descriptor(group)?;
        let bytes = self.block_mut(block)?;
        let value = i32::from(u16_at(bytes, at + counter as usize)) + by;
        let value = u16::try_from(value).map_err(|_| damaged(format!("group {group} has wrong counters")))?;
        put16(bytes, at + counter as usize, value);
        Ok(())
    }

    /// Adds to the superblock's numbers of free blocks and inodes.
    pub(super) fn count_free(&mut self, blocks: u32, inodes: u32) -> Result<(), Ext4Error> {
        let sb = self.superblock()?;
        for (at, by) in [(0xc, blocks), (0x10, inodes)] {
            let value = u32_at(sb, at).checked_add(by).ok_or_else(|| damaged("it has wrong free counts"))?;
            put32(sb, at, value);
        }
        Ok(())
    }

    fn descriptor(&self, group: u32) -> Result<(u64, usize), Ext4Error> {
        if group >= self.groups {
            return Err(damaged(format!("there is no block group {group}")));
        }
        let byte = group as usize * GROUP_DESCRIPTOR;
        Ok((1 + (byte / BLOCK) as u64, byte % BLOCK))
    }

    fn pointer(&mut self, group: u32, field: usize) -> Result<u64, Ext4Error> {
        let (block, at) = self.descriptor(group)?;
        let pointer = u64::from(u32_at(self.block(block)?, at + field));
        if pointer == 0 || pointer >= self.blocks {
            return Err(damaged(format!("block group {group} points outside of the disk")));
        }
        Ok(pointer)
    }

    fn cached(&mut self, block: u64) -> Result<&mut Cached, Ext4Error> {
        if block >= self.blocks {
            return Err(damaged(format!("block {block} is outside of the disk")));
        }
        if self.cache.len() >= CACHED && !self.cache.contains_key(&block) {
            self.flush()?;
            self.cache.clear();
        }
        match self.cache.entry(block) {
            std::collections::btree_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let mut bytes = Box::new([0; BLOCK]);
                self.file
                    .read_exact_at(&mut bytes[..], block * BLOCK as u64)
                    .map_err(|source| Ext4Error::Read { block, source })?;
                Ok(entry.insert(Cached { bytes, dirty: false }))
            }
        }
    }

    /// Writes the changed blocks to the file, which the caller has to fsync.
    pub(super) fn flush(&mut self) -> Result<(), Ext4Error> {
        for (&block, cached) in self.cache.iter_mut().filter(|(_, cached)| cached.dirty) {
            self.file
                .write_all_at(&cached.bytes[..], block * BLOCK as u64)
                .map_err(|source| Ext4Error::Write { block, source })?;
            cached.dirty = false;
        }
        Ok(())
    }
}
