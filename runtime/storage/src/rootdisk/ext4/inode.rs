//! One inode: the fields that a tree is made of.

use super::{INODE, put16, put32, u16_at, u32_at};
use crate::rootdisk::manifest::Ext4Time;

pub(super) const EXTENTS: u32 = 0x80000;
const INDEX: u32 = 0x1000;

/// A copy of an inode.
#[derive(Clone)]
pub(super) struct Ext4Inode([u8; INODE]);

impl Ext4Inode {
    pub(super) fn new(bytes: [u8; INODE]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&self) -> &[u8; INODE] {
        &self.0
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8; INODE] {
        &mut self.0
    }

    /// Type and permissions, as in `st_mode`.
    pub(super) fn mode(&self) -> u32 {
        u16_at(&self.0, 0).into()
    }

    pub(super) fn set_permissions(&mut self, permissions: u16) {
        let mode = u16_at(&self.0, 0) & 0xf000 | permissions & 0xfff;
        put16(&mut self.0, 0, mode);
    }

    pub(super) fn uid(&self) -> u32 {
        u32::from(u16_at(&self.0, 2)) | u32::from(u16_at(&self.0, 0x78)) << 16
    }

    pub(super) fn gid(&self) -> u32 {
        u32::from(u16_at(&self.0, 0x18)) | u32::from(u16_at(&self.0, 0x7a)) << 16
    }

    pub(super) fn set_owner(&mut self, uid: u32, gid: u32) {
        for (low, high, id) in [(2, 0x78, uid), (0x18, 0x7a, gid)] {
            put16(&mut self.0, low, id as u16);
            put16(&mut self.0, high, (id >> 16) as u16);
        }
    }

    pub(super) fn size(&self) -> u64 {
        u64::from(u32_at(&self.0, 4)) | u64::from(u32_at(&self.0, 0x6c)) << 32
    }

    pub(super) fn links(&self) -> u16 {
        u16_at(&self.0, 0x1a)
    }

    pub(super) fn set_links(&mut self, links: u16) {
        put16(&mut self.0, 0x1a, links);
    }

    pub(super) fn has_extents(&self) -> bool {
        u32_at(&self.0, 0x20) & EXTENTS != 0
    }

    /// The 60 bytes that hold the extent tree's root, a short symbolic link or a device number.
    pub(super) fn area(&self) -> &[u8] {
        &self.0[0x28..0x64]
    }

    /// Major and minor number of a device: the old encoding in the first word, or else the new in the second.
    pub(super) fn device(&self) -> (u32, u32) {
        let (old, new) = (u32_at(self.area(), 0), u32_at(self.area(), 4));
        if old != 0 {
            (old >> 8 & 0xff, old & 0xff)
        } else {
            ((new & 0xfff00) >> 8, new & 0xff | new >> 12 & 0xfff00)
        }
    }

    /// The block with the extended attributes that are not in the inode; 0 for none.
    pub(super) fn xattr_block(&self) -> u64 {
        u64::from(u32_at(&self.0, 0x68)) | u64::from(u16_at(&self.0, 0x76)) << 32
    }

    /// Where the extended attributes in the inode begin, with their magic number.
    pub(super) fn xattr_start(&self) -> Option<usize> {
        let start = 128 + usize::from(u16_at(&self.0, 0x80));
        (start.is_multiple_of(4) && (0xa0..INODE - 4).contains(&start)).then_some(start)
    }

    pub(super) fn mtime(&self) -> Ext4Time {
        let extra = u32_at(&self.0, 0x88);
        let seconds = i64::from(u32_at(&self.0, 0x10) as i32) + (i64::from(extra & 3) << 32);
        Ext4Time { seconds, nanoseconds: extra >> 2 }
    }

    /// Sets the times of creation, modification, change and access.
    pub(super) fn set_times(&mut self, time: Ext4Time) {
        let seconds = time.seconds as u32;
        let epoch = ((time.seconds - i64::from(seconds as i32)) >> 32) as u32 & 3;
        let extra = time.nanoseconds << 2 | epoch;
        for (at, at_extra) in [(0xc, 0x84), (0x10, 0x88), (8, 0x8c), (0x90, 0x94)] {
            put32(&mut self.0, at, seconds);
            put32(&mut self.0, at_extra, extra);
        }
    }

    /// Clears what is not a property of the tree: deletion time, generation, version, and flags other than
    /// those of the layout.
    pub(super) fn clear_incidentals(&mut self) {
        let flags = u32_at(&self.0, 0x20) & (EXTENTS | INDEX);
        put32(&mut self.0, 0x20, flags);
        for at in [0x14, 0x24, 0x64, 0x98] {
            put32(&mut self.0, at, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_beyond_32_bits_keep_their_value() {
        for seconds in
            [Ext4Time::MIN.seconds, -1, 0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, Ext4Time::MAX.seconds]
        {
            let mut inode = Ext4Inode::new([0; INODE]);
            let time = Ext4Time { seconds, nanoseconds: 999_999_999 };
            inode.set_times(time);
            assert_eq!(inode.mtime(), time);
        }
    }

    #[test]
    fn owners_and_devices_use_both_halves() {
        let mut inode = Ext4Inode::new([0; INODE]);
        inode.set_owner(0x1234_5678, u32::MAX);
        assert_eq!((inode.uid(), inode.gid()), (0x1234_5678, u32::MAX));
        let (major, minor) = (0xabc_u32, 0xd_ef12_u32);
        put32(inode.bytes_mut(), 0x2c, minor & 0xff | major << 8 | (minor & !0xff) << 12);
        assert_eq!(inode.device(), (major, minor));
    }
}
