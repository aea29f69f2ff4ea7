//! The ext4 format as far as the cache needs it: to make the bytes that mke2fs wrote a function of the tree
//! alone ([`normalise`]), and to read a disk back without mounting it ([`manifest`]).
//!
//! Only disks with the features that [`super::mkfs`] asks for are understood, without checksums and with a
//! journal that was never used; all else is refused. Source: the kernel's Documentation/filesystems/ext4 and
//! fs/ext4/ext4.h; all numbers are little-endian.

mod dir;
mod extent;
mod image;
mod inode;
mod lost_found;
mod normalise;
mod read;
mod relink;
mod xattr;

use std::io;

pub(super) use normalise::set_uuid;
pub(crate) use normalise::{OriginMarks, normalise};
pub(super) use read::manifest;

/// Bytes of a block; the only size that is understood.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of an inode; the only size that is understood.
pub(crate) const INODE: usize = 256;

const ROOT: u32 = 2;

/// Why a disk could not be read or normalised.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// A block of the disk cannot be read.
    #[error("cannot read block {block} of the disk")]
    Read {
        /// The number of the block, in blocks of 4 KiB.
        block: u64,
        /// What the system answered.
        source: io::Error,
    },
    /// A block of the disk cannot be written.
    #[error("cannot write block {block} of the disk")]
    Write {
        /// The number of the block, in blocks of 4 KiB.
        block: u64,
        /// What the system answered.
        source: io::Error,
    },
    /// The disk has features, blocks or inodes that machinen does not ask mke2fs for.
    #[error("the disk has {what}")]
    Unsupported {
        /// What the disk has.
        what: String,
    },
    /// The disk contradicts itself.
    #[error("the disk is damaged: {what}")]
    Damaged {
        /// What is wrong with the disk.
        what: String,
    },
    /// The extended attributes of a file do not fit into its inode and one block.
    #[error("{path} has more extended attributes than fit on the disk (about 4 KiB a file)")]
    Xattrs {
        /// Path of the file on the disk.
        path: String,
    },
    /// A file on the disk is not the one of the source.
    #[error("{path} on the disk differs from the source: {what}; it changed while it was being converted")]
    Differs {
        /// Path of the file on the disk.
        path: String,
        /// What differs.
        what: String,
    },
}

fn damaged(what: impl Into<String>) -> Ext4Error {
    Ext4Error::Damaged { what: what.into() }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
