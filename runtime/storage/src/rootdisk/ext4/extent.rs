//! Which blocks of the disk hold which blocks of a file.

use super::{Ext4Error, damaged, image::Ext4Image, inode::Ext4Inode, u16_at, u32_at};

const MAGIC: u16 = 0xf30a;
const MAX_DEPTH: u16 = 5;
/// Longest initialised extent; longer values mean unwritten ones.
const MAX_LENGTH: u16 = 32768;

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ext4Extent {
    /// First block in the file.
    pub(super) logical: u64,
    /// First block on the disk.
    pub(super) physical: u64,
    pub(super) blocks: u64,
}

impl Ext4Image<'_> {
    /// The extents of a file or directory in the file's order, inside of the disk and not overlapping in the
    /// file.
    pub(super) fn extents(&mut self, inode: &Ext4Inode) -> Result<Vec<Ext4Extent>, Ext4Error> {
        if !inode.has_extents() {
            return Err(damaged("a file has no extents"));
        }
        let mut extents = Vec::new();
        self.node(inode.area(), None, &mut extents)?;
        let ordered = extents.windows(2).all(|pair| pair[0].logical + pair[0].blocks <= pair[1].logical);
        if !ordered {
            return Err(damaged("a file has overlapping extents"));
        }
        Ok(extents)
    }

    /// Reads one node of the extent tree; `depth` is what its parent promised.
    fn node(
        &mut self,
        node: &[u8],
        depth: Option<u16>,
        found: &mut Vec<Ext4Extent>,
    ) -> Result<(), Ext4Error> {
        let (entries, levels) = (usize::from(u16_at(node, 2)), u16_at(node, 6));
        let fits = entries < node.len() / 12 && levels <= MAX_DEPTH;
        if u16_at(node, 0) != MAGIC || !fits || depth.is_some_and(|depth| depth != levels) {
            return Err(damaged("a file has a malformed extent tree"));
        }
        for entry in node[12..].chunks_exact(12).take(entries) {
            if levels > 0 {
                let child = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
                let block = *self.block(child)?;
                self.node(&block, Some(levels - 1), found)?;
                continue;
            }
            let length = u16_at(entry, 4);
            let extent = Ext4Extent {
                logical: u32_at(entry, 0).into(),
                physical: u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32,
                blocks: length.into(),
            };
            if length == 0 || length > MAX_LENGTH {
                return Err(damaged("a file has an empty or unwritten extent"));
            }
            if extent.physical == 0 || extent.physical + extent.blocks > self.blocks() {
                return Err(damaged("a file has blocks outside of the disk"));
            }
            found.push(extent);
        }
        Ok(())
    }
}
