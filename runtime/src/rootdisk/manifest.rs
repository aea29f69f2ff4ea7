//! What a disk's key is the digest of: every file of the tree with all that containers can see of it.
//!
//! Records come in the order of a walk that visits the names of a directory sorted by their bytes, and every field is
//! prefixed by its length or has a fixed one, so that different trees never give the same bytes. Not in it, because
//! they say when and where an image was unpacked: inode numbers, times of access and change, link counts beyond the
//! tree, and the time of the root directory.

use sha2::{Digest as _, Sha256};

use super::key::Key;

/// Part of every key: raise it when the bytes of a disk made of the same tree change.
pub(super) const FORMAT: u32 = 1;

/// The types of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fifo = 1,
    Character = 2,
    Directory = 4,
    Block = 6,
    File = 8,
    Symlink = 10,
    Socket = 12,
}

impl Kind {
    /// The type bits of `st_mode`, which are the same on an ext4 disk.
    pub(super) fn of(mode: u32) -> Option<Self> {
        Some(match (mode & 0o170_000) >> 12 {
            1 => Self::Fifo,
            2 => Self::Character,
            4 => Self::Directory,
            6 => Self::Block,
            8 => Self::File,
            10 => Self::Symlink,
            12 => Self::Socket,
            _ => return None,
        })
    }

    pub(super) fn mode(self) -> u32 {
        (self as u32) << 12
    }

    /// Whether several names of one file stay one file on the disk: mke2fs copies symbolic links one by one.
    pub(super) fn may_be_linked(self) -> bool {
        !matches!(self, Self::Directory | Self::Symlink)
    }
}

/// A time as ext4 holds it: 34 bits of seconds since 1970 from 1901 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

impl Time {
    pub(super) const MIN: Self = Self { seconds: i32::MIN as i64, nanoseconds: 0 };
    pub(super) const MAX: Self = Self { seconds: i32::MAX as i64 + (3 << 32), nanoseconds: 999_999_999 };

    /// The nearest time that ext4 holds.
    pub(super) fn clamped(seconds: i64, nanoseconds: u32) -> Self {
        Self { seconds, nanoseconds }.clamp(Self::MIN, Self::MAX)
    }
}

/// Names and values of extended attributes, sorted by name.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One file of the tree, under the first of its names.
#[derive(Debug)]
pub(super) struct Record<'a> {
    /// From the root, without a leading slash; empty for the root.
    pub(super) path: &'a [u8],
    pub(super) kind: Kind,
    /// Permissions with setuid, setgid and sticky bit.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    /// Sorted by name.
    pub(super) xattrs: &'a [(Vec<u8>, Vec<u8>)],
    pub(super) node: Node<'a>,
}

/// What only some types have.
#[derive(Debug, Clone, Copy)]
pub(super) enum Node<'a> {
    File { size: u64, content: [u8; 32] },
    Symlink { target: &'a [u8] },
    Device { number: (u32, u32) },
    Other,
}

/// The digest in the making.
pub(super) struct Manifest(Sha256);

impl Manifest {
    /// `disk_size` in bytes.
    pub(super) fn new(disk_size: u64) -> Self {
        let mut digest = Sha256::new();
        digest.update(b"machinen rootdisk\0");
        digest.update(FORMAT.to_le_bytes());
        digest.update(disk_size.to_le_bytes());
        Self(digest)
    }

    pub(super) fn add(&mut self, record: &Record<'_>) {
        self.0.update([record.kind as u8]);
        self.bytes(record.path);
        self.0.update(record.mode.to_le_bytes());
        self.0.update(record.uid.to_le_bytes());
        self.0.update(record.gid.to_le_bytes());
        if !record.path.is_empty() {
            self.0.update(record.mtime.seconds.to_le_bytes());
            self.0.update(record.mtime.nanoseconds.to_le_bytes());
        }
        self.0.update((record.xattrs.len() as u64).to_le_bytes());
        for (name, value) in record.xattrs {
            self.bytes(name);
            self.bytes(value);
        }
        match record.node {
            Node::File { size, content } => {
                self.0.update(size.to_le_bytes());
                self.0.update(content);
            }
            Node::Symlink { target } => self.bytes(target),
            Node::Device { number } => {
                self.0.update(number.0.to_le_bytes());
                self.0.update(number.1.to_le_bytes());
            }
            Node::Other => {}
        }
    }

    /// Another name of the file whose record has the path `first`.
    pub(super) fn add_link(&mut self, path: &[u8], first: &[u8]) {
        self.0.update([0]);
        self.bytes(path);
        self.bytes(first);
    }

    pub(super) fn finish(self) -> Key {
        Key::new(self.0.finalize().into())
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}
