//! Removes the lost+found that mke2fs always makes: the tree of an image has none.

use super::dir::entries;
use super::image::{Counter, Image};
use super::{Ext4Error, ROOT, damaged, put16, u16_at, u32_at};

pub(super) const NAME: &[u8] = b"lost+found";

impl Image<'_> {
    /// Removes the empty directory `/lost+found`, as rmdir(2) would.
    pub(super) fn remove_lost_found(&mut self, ino: u32) -> Result<(), Ext4Error> {
        let inode = self.inode(ino)?;
        if inode.mode() & 0xf000 != 0x4000 || !self.directory(&inode)?.is_empty() {
            return Err(damaged("lost+found is not an empty directory"));
        }
        let mut root = self.inode(ROOT)?;
        let first = self.extents(&root)?.first().map(|extent| extent.physical);
        let first = first.ok_or_else(|| damaged("the root directory has no blocks"))?;
        self.unlink(first, ino)?;
        root.set_links(
            root.links().checked_sub(1).ok_or_else(|| damaged("the root directory has no links"))?,
        );
        self.put_inode(ROOT, &root)?;

        let mut freed = 0;
        for extent in self.extents(&inode)? {
            for block in extent.physical..extent.physical + extent.blocks {
                let per_group = u64::from(self.blocks_per_group());
                let (group, bit) = ((block / per_group) as u32, (block % per_group) as usize);
                clear(self.block_bitmap(group)?, bit)?;
                self.count(group, Counter::FreeBlocks, 1)?;
                // So that the free blocks of all disks are alike, whatever mke2fs left there.
                self.block_mut(block)?.fill(0);
                freed += 1;
            }
        }
        let mut empty = inode;
        empty.bytes_mut().fill(0);
        self.put_inode(ino, &empty)?;
        // lost+found is made right after the reserved inodes, so it is in the first group.
        clear(self.inode_bitmap(0)?, ino as usize - 1)?;
        self.count(0, Counter::FreeInodes, 1)?;
        self.count(0, Counter::Directories, -1)?;
        self.count_free(freed, 1)
    }

    /// Gives the space of the inode's record to the record before it.
    fn unlink(&mut self, block: u64, ino: u32) -> Result<(), Ext4Error> {
        let mut records = Vec::new();
        entries(self.block(block)?, |at, bytes| records.push((at, u32_at(bytes, at))))?;
        let index = records.iter().position(|&(_, other)| other == ino).filter(|&index| index > 0);
        let index = index.ok_or_else(|| damaged("lost+found is not at the start of the root directory"))?;
        let (before, at) = (records[index - 1].0, records[index].0);
        let bytes = self.block_mut(block)?;
        let (first, second) = (u16_at(bytes, before + 4), u16_at(bytes, at + 4));
        bytes[at..at + 8 + NAME.len()].fill(0);
        put16(bytes, before + 4, first + second);
        Ok(())
    }
}

fn clear(bitmap: &mut [u8], bit: usize) -> Result<(), Ext4Error> {
    let byte = bitmap.get_mut(bit / 8).filter(|byte| **byte & 1 << (bit % 8) != 0);
    *byte.ok_or_else(|| damaged("lost+found is not marked as used"))? &= !(1 << (bit % 8));
    Ok(())
}
