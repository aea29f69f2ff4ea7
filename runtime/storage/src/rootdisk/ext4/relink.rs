//! Makes the names of one symbolic link one file again: mke2fs copies regular files, devices, fifos and
//! sockets with several names once, but a symbolic link for each name.

use super::{
    Ext4Error, damaged,
    dir::entries,
    image::{Counter, Ext4Image},
    inode::Ext4Inode,
    put32, u32_at,
};

impl Ext4Image<'_> {
    /// Changes the entry `name` of the directory `dir` from the copy `from` to the inode `to`, and removes
    /// the copy.
    pub(super) fn relink(&mut self, dir: u32, name: &[u8], from: u32, to: u32) -> Result<(), Ext4Error> {
        let dir = self.inode(dir)?;
        self.repoint(&dir, name, from, to)?;
        let copy = self.inode(from)?;
        // A short target is in the inode itself.
        let mut freed = if copy.has_extents() { self.free_blocks(&copy)? } else { 0 };
        if copy.xattr_block() != 0 {
            self.free_block(copy.xattr_block())?;
            freed += 1;
        }
        self.free_inode(from, copy)?;
        self.count_free(freed, 1)
    }

    fn repoint(&mut self, dir: &Ext4Inode, name: &[u8], from: u32, to: u32) -> Result<(), Ext4Error> {
        for extent in self.extents(dir)? {
            for block in extent.physical..extent.physical + extent.blocks {
                let mut found = None;
                entries(self.block(block)?, |at, bytes| {
                    let is_name = &bytes[at + 8..at + 8 + usize::from(bytes[at + 6])] == name;
                    if is_name && u32_at(bytes, at) == from {
                        found = Some(at);
                    }
                })?;
                if let Some(at) = found {
                    put32(self.block_mut(block)?, at, to);
                    return Ok(());
                }
            }
        }
        Err(damaged("a name is not in its directory"))
    }

    /// Marks the blocks of a file's content as free, and returns how many they are.
    pub(super) fn free_blocks(&mut self, inode: &Ext4Inode) -> Result<u32, Ext4Error> {
        let mut freed = 0;
        for extent in self.extents(inode)? {
            for block in extent.physical..extent.physical + extent.blocks {
                self.free_block(block)?;
                freed += 1;
            }
        }
        Ok(freed)
    }

    fn free_block(&mut self, block: u64) -> Result<(), Ext4Error> {
        let per_group = u64::from(self.blocks_per_group());
        let (group, bit) = ((block / per_group) as u32, (block % per_group) as usize);
        clear(self.block_bitmap(group)?, bit)?;
        self.count(group, Counter::FreeBlocks, 1)?;
        // Free blocks are zeroed, so that they are the same on all disks.
        self.block_mut(block)?.fill(0);
        Ok(())
    }

    /// Marks an inode as free. The caller has to update the superblock's count of free inodes.
    pub(super) fn free_inode(&mut self, ino: u32, mut inode: Ext4Inode) -> Result<(), Ext4Error> {
        inode.bytes_mut().fill(0);
        self.put_inode(ino, &inode)?;
        let per_group = self.inodes_per_group();
        let (group, bit) = ((ino - 1) / per_group, (ino - 1) % per_group);
        clear(self.inode_bitmap(group)?, bit as usize)?;
        self.count(group, Counter::FreeInodes, 1)
    }
}

fn clear(bitmap: &mut [u8], bit: usize) -> Result<(), Ext4Error> {
    let byte = bitmap.get_mut(bit / 8).filter(|byte| **byte & 1 << (bit % 8) != 0);
    *byte.ok_or_else(|| damaged("a removed block or inode is not marked as used"))? &= !(1 << (bit % 8));
    Ok(())
}
