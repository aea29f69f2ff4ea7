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

pub(super) use normalise::{OriginMarks, normalise, set_uuid};
pub(super) use read::manifest;

/// Bytes of a block; the only size that is understood.
pub(super) const BLOCK: usize = 4096;
/// Bytes of an inode; the only size that is understood.
pub(super) const INODE: usize = 256;

const ROOT: u32 = 2;

/// Why a disk could not be read or normalised.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    #[error("cannot read block {block} of the disk")]
    Read { block: u64, source: io::Error },
    #[error("cannot write block {block} of the disk")]
    Write { block: u64, source: io::Error },
    #[error("the disk has {what}")]
    Unsupported { what: String },
    #[error("the disk is damaged: {what}")]
    Damaged { what: String },
    #[error("{path} has more extended attributes than fit on the disk (about 4 KiB a file)")]
    Xattrs { path: String },
    #[error("{path} on the disk differs from the source: {what}; it changed while it was being converted")]
    Differs { path: String, what: String },
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
