//! Removes the lost+found that mke2fs always makes: the tree of an image has none.

use super::{
    Ext4Error, ROOT, damaged,
    dir::entries,
    image::{Counter, Ext4Image},
    inode::Ext4Inode,
    put16, u16_at, u32_at,
};

pub(super) const NAME: &[u8] = b"lost+found";

impl Ext4Image<'_> {
    /// Removes the empty directory `/lost+found`, as rmdir(2) would.
    pub(super) fn remove_lost_found(&mut self, ino: u32) -> Result<(), Ext4Error> {
        let inode = self.inode(ino)?;
        if inode.mode() & 0xf000 != 0x4000 || !self.directory(&inode)?.is_empty() {
            return Err(damaged("lost+found is not an empty directory"));
        }
        let mut root = self.inode(ROOT)?;
        self.unlink(&root, ino)?;
        root.set_links(
            root.links().checked_sub(1).ok_or_else(|| damaged("the root directory has no links"))?,
        );
        self.put_inode(ROOT, &root)?;

        let freed = self.free_blocks(&inode)?;
        self.free_inode(ino, inode)?;
        // lost+found is made right after the reserved inodes, so it is in the first group.
        self.count(0, Counter::Directories, -1)?;
        self.count_free(freed, 1)
    }

    /// Removes the inode's record from a directory.
    fn unlink(&mut self, dir: &Ext4Inode, ino: u32) -> Result<(), Ext4Error> {
        for extent in self.extents(dir)? {
            for block in extent.physical..extent.physical + extent.blocks {
                let mut records = Vec::new();
                entries(self.block(block)?, |at, bytes| records.push((at, u32_at(bytes, at))))?;
                let Some(index) = records.iter().position(|&(_, other)| other == ino) else { continue };
                let at = records[index].0;
                let bytes = self.block_mut(block)?;
                let length = u16_at(bytes, at + 4);
                bytes[at..at + 8 + NAME.len()].fill(0);
                match index.checked_sub(1).map(|before| records[before].0) {
                    // The preceding record gets its space.
                    Some(before) => {
                        let sum = u16_at(bytes, before + 4) + length;
                        put16(bytes, before + 4, sum);
                    }
                    // The first record of a block stays, without an inode.
                    None => put16(bytes, at + 4, length),
                }
                return Ok(());
            }
        }
        Err(damaged("lost+found is not in the root directory"))
    }
}
