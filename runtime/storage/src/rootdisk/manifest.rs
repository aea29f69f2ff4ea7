//! The manifest of a tree, whose digest is the disk's key: every file with all properties that containers can
//! see.
//!
//! Records are in the order of a walk that visits the names of a directory sorted by their bytes. Every field
//! has a fixed length or is prefixed by its length, so that different trees never give the same bytes. Some
//! properties are left out, because they depend on when and where an image was unpacked: inode numbers, times
//! of access and change, link counts beyond the tree, and the time of the root directory.

use sha2::{Digest as _, Sha256};

use super::key::RootdiskKey;

/// Part of every key: raise it when the bytes of a disk made of the same tree change.
pub(super) const FORMAT: u32 = 1;

/// The types of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Fifo = 1,
    Character = 2,
    Directory = 4,
    Block = 6,
    File = 8,
    Symlink = 10,
    Socket = 12,
}

impl FileKind {
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

    /// Whether a file of this type may have several names.
    pub(super) fn may_be_linked(self) -> bool {
        self != Self::Directory
    }
}

/// A time as ext4 stores it: 34 bits of seconds, of which the first is in 1901.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ext4Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

impl Ext4Time {
    pub(super) const MIN: Self = Self { seconds: i32::MIN as i64, nanoseconds: 0 };
    pub(super) const MAX: Self = Self { seconds: i32::MAX as i64 + (3 << 32), nanoseconds: 999_999_999 };

    /// The nearest time that ext4 can store.
    pub(super) fn clamped(seconds: i64, nanoseconds: u32) -> Self {
        Self { seconds, nanoseconds }.clamp(Self::MIN, Self::MAX)
    }
}

/// Names and values of extended attributes, sorted by name.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// One file of the tree, under the first of its names.
#[derive(Debug)]
pub(super) struct FileRecord<'a> {
    /// From the root, without a leading slash; empty for the root.
    pub(super) path: &'a [u8],
    pub(super) kind: FileKind,
    /// Permissions with setuid, setgid and sticky bit.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Ext4Time,
    /// Sorted by name.
    pub(super) xattrs: &'a [(Vec<u8>, Vec<u8>)],
    pub(super) node: RecordData<'a>,
}

/// The properties that only some types of files have.
#[derive(Debug, Clone, Copy)]
pub(super) enum RecordData<'a> {
    File { size: u64, content: [u8; 32] },
    Symlink { target: &'a [u8] },
    Device { number: (u32, u32) },
    Other,
}

/// Computes the digest of a manifest.
pub(super) struct TreeManifest(Sha256);

impl TreeManifest {
    /// `disk_size` in bytes.
    pub(super) fn new(disk_size: u64) -> Self {
        let mut digest = Sha256::new();
        digest.update(b"machinen rootdisk\0");
        digest.update(FORMAT.to_le_bytes());
        digest.update(disk_size.to_le_bytes());
        Self(digest)
    }

    pub(super) fn add(&mut self, record: &FileRecord<'_>) {
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
            RecordData::File { size, content } => {
                self.0.update(size.to_le_bytes());
                self.0.update(content);
            }
            RecordData::Symlink { target } => self.bytes(target),
            RecordData::Device { number } => {
                self.0.update(number.0.to_le_bytes());
                self.0.update(number.1.to_le_bytes());
            }
            RecordData::Other => {}
        }
    }

    /// Adds another name of the file whose record has the path `first`.
    pub(super) fn add_link(&mut self, path: &[u8], first: &[u8]) {
        self.0.update([0]);
        self.bytes(path);
        self.bytes(first);
    }

    pub(super) fn finish(self) -> RootdiskKey {
        RootdiskKey::new(self.0.finalize().into())
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A record that owns what it refers to.
    #[derive(Debug, Clone, PartialEq)]
    struct Owned {
        path: Vec<u8>,
        kind: u8,
        mode: u16,
        owner: (u32, u32),
        mtime: (i64, u32),
        xattrs: Xattrs,
        size: u64,
        content: [u8; 32],
        target: Vec<u8>,
        device: (u32, u32),
    }

    fn owned() -> impl Strategy<Value = Owned> {
        let bytes = || prop::collection::vec(1_u8..4, 1..4);
        let kind = prop::sample::select(vec![1_u8, 2, 4, 6, 8, 10, 12]);
        let time = (-9_i64..9, 0_u32..3);
        let xattrs = prop::collection::vec((bytes(), bytes()), 0..3);
        let rest = (0_u64..3, any::<bool>(), bytes(), (0_u32..3, 0_u32..3));
        (bytes(), kind, 0_u16..3, (0_u32..3, 0_u32..3), time, xattrs, rest).prop_map(
            |(path, kind, mode, owner, mtime, xattrs, (size, content, target, device))| {
                let mut record = Owned {
                    path,
                    kind,
                    mode,
                    owner,
                    mtime,
                    xattrs,
                    size,
                    content: [content.into(); 32],
                    target,
                    device,
                };
                // Properties that a type does not have are not in the manifest either.
                if kind != 8 {
                    (record.size, record.content) = (0, [0; 32]);
                }
                if kind != 10 {
                    record.target.clear();
                }
                if !matches!(kind, 2 | 6) {
                    record.device = (0, 0);
                }
                record
            },
        )
    }

    fn key(records: &[Owned]) -> RootdiskKey {
        let mut manifest = TreeManifest::new(1 << 20);
        for owned in records {
            let kind = FileKind::of(u32::from(owned.kind) << 12).unwrap();
            let node = match kind {
                FileKind::File => RecordData::File { size: owned.size, content: owned.content },
                FileKind::Symlink => RecordData::Symlink { target: &owned.target },
                FileKind::Character | FileKind::Block => RecordData::Device { number: owned.device },
                _ => RecordData::Other,
            };
            manifest.add(&FileRecord {
                path: &owned.path,
                kind,
                mode: owned.mode,
                uid: owned.owner.0,
                gid: owned.owner.1,
                mtime: Ext4Time { seconds: owned.mtime.0, nanoseconds: owned.mtime.1 },
                xattrs: &owned.xattrs,
                node,
            });
        }
        manifest.finish()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn keys_are_equal_exactly_for_equal_trees(
            one in prop::collection::vec(owned(), 0..3), other in prop::collection::vec(owned(), 0..3),
        ) {
            prop_assert_eq!(key(&one) == key(&other), one == other);
            prop_assert_eq!(key(&one), key(&one.clone()));
        }

        #[test]
        fn every_field_counts(record in owned(), other in owned()) {
            let with = |change: &dyn Fn(&mut Owned)| {
                let mut changed = record.clone();
                change(&mut changed);
                changed
            };
            let changes = [
                with(&|record| record.path.clone_from(&other.path)),
                with(&|record| record.mode = other.mode),
                with(&|record| record.owner.0 = other.owner.0),
                with(&|record| record.owner.1 = other.owner.1),
                with(&|record| record.mtime.0 = other.mtime.0),
                with(&|record| record.mtime.1 = other.mtime.1),
                with(&|record| record.xattrs.clone_from(&other.xattrs)),
                with(&|record| if record.kind == 8 { record.size += 1 }),
                with(&|record| if record.kind == 8 { record.content[31] ^= 1 }),
                with(&|record| if record.kind == 10 { record.target.push(b'x') }),
                with(&|record| if matches!(record.kind, 2 | 6) { record.device.1 += 1 }),
            ];
            for changed in changes {
                let (records, changed) = ([record.clone()], [changed]);
                prop_assert_eq!(key(&records) == key(&changed), records == changed);
            }
        }
    }

    #[test]
    fn the_root_has_no_time_and_links_have_a_file() {
        let root = |seconds| {
            let mut manifest = TreeManifest::new(0);
            let mtime = Ext4Time { seconds, nanoseconds: 0 };
            let (path, node) = (&b""[..], RecordData::Other);
            manifest.add(&FileRecord {
                path,
                kind: FileKind::Directory,
                mode: 0,
                uid: 0,
                gid: 0,
                mtime,
                xattrs: &[],
                node,
            });
            manifest.finish()
        };
        assert_eq!(root(1), root(2));
        let link = |first: &[u8]| {
            let mut manifest = TreeManifest::new(0);
            manifest.add_link(b"name", first);
            manifest.finish()
        };
        assert_ne!(link(b"a"), link(b"b"));
        assert_ne!(TreeManifest::new(0).finish(), TreeManifest::new(1).finish());
    }

    /// The keys of disks that exist: if this fails, raise [`FORMAT`].
    #[test]
    fn the_format_is_what_it_was() {
        let file = Owned {
            path: b"a".to_vec(),
            kind: 8,
            mode: 0o644,
            owner: (1, 2),
            mtime: (3, 4),
            xattrs: vec![(b"user.x".to_vec(), b"y".to_vec())],
            size: 5,
            content: [6; 32],
            target: Vec::new(),
            device: (0, 0),
        };
        assert_eq!(FORMAT, 1);
        let expected = "34a97e728b8b8dcac532c16faf1eee0f07768fe95e0a359e52ebcbf92b32c294";
        assert_eq!(key(&[file]).to_string(), expected);
    }
}
