//! The entries of a directory.

use super::{BLOCK, Ext4Error, damaged, image::Ext4Image, inode::Ext4Inode, u16_at, u32_at};

/// A name in a directory, without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DirEntry {
    pub(super) name: Vec<u8>,
    pub(super) ino: u32,
}

impl Ext4Image<'_> {
    /// All entries in the disk's order.
    pub(super) fn directory(&mut self, inode: &Ext4Inode) -> Result<Vec<DirEntry>, Ext4Error> {
        let mut found = Vec::new();
        for extent in self.extents(inode)? {
            for block in extent.physical..extent.physical + extent.blocks {
                entries(self.block(block)?, |at, bytes| {
                    let (ino, length) = (u32_at(bytes, at), usize::from(bytes[at + 6]));
                    let name = &bytes[at + 8..at + 8 + length];
                    if ino != 0 && name != b"." && name != b".." {
                        found.push(DirEntry { name: name.to_vec(), ino });
                    }
                })?;
            }
        }
        Ok(found)
    }
}

/// Calls `each` with the offset of every record of a directory block, after it was checked to be inside of
/// the block.
pub(super) fn entries(
    block: &[u8; BLOCK],
    mut each: impl FnMut(usize, &[u8; BLOCK]),
) -> Result<(), Ext4Error> {
    let mut at = 0;
    while at < BLOCK {
        let malformed = || damaged("a directory has a malformed entry");
        if at + 8 > BLOCK {
            return Err(malformed());
        }
        let (length, name) = (usize::from(u16_at(block, at + 4)), usize::from(block[at + 6]));
        if length < 8 + name || !length.is_multiple_of(4) || at + length > BLOCK {
            return Err(malformed());
        }
        if u32_at(block, at) != 0 && (name == 0 || block[at + 8..at + 8 + name].contains(&b'/')) {
            return Err(malformed());
        }
        each(at, block);
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootdisk::ext4::{put16, put32};

    #[test]
    fn records_that_leave_the_block_are_refused() {
        let mut block = [0; BLOCK];
        assert!(entries(&block, |_, _| ()).is_err(), "a record of no length");
        put16(&mut block, 4, BLOCK as u16);
        let mut seen = Vec::new();
        entries(&block, |at, _| seen.push(at)).unwrap();
        assert_eq!(seen, [0]);
        put16(&mut block, 4, 4092);
        assert!(entries(&block, |_, _| ()).is_err(), "four bytes are left over");
        put16(&mut block, 4, BLOCK as u16);
        put32(&mut block, 0, 12);
        block[6] = 3;
        block[8..11].copy_from_slice(b"a/b");
        assert!(entries(&block, |_, _| ()).is_err(), "a name with a slash");
    }
}
