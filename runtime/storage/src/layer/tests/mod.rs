//! Tests with archives as the agent sends them, and as a hostile guest would. They need root.

mod copy;
mod faithful;
mod hostile;
mod merge;
mod staging;
mod whole;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use machinen_base::space::DiskReserve;
use machinen_protocol::layer::push_record;
use tar::{Builder, EntryType, Header};

use super::{AppliedLayer, LayerError, LayerLimits, apply};

const LIMITS: LayerLimits = LayerLimits { entries: 1000, bytes: 64 << 20, reserve: DiskReserve::percent(0) };

/// An archive that grows entry by entry; names are taken as they are.
struct TestArchive {
    builder: Builder<Vec<u8>>,
    records: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
}

impl TestArchive {
    /// An archive that begins with the root.
    fn new() -> Self {
        Self::without_root().dir(".")
    }

    fn without_root() -> Self {
        Self { builder: Builder::new(Vec::new()), records: Vec::new(), mode: 0o755, owner: (0, 0) }
    }

    /// A record for the next entry.
    fn record(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        push_record(&mut self.records, key.as_bytes(), value.as_ref());
        self
    }

    fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.record(&format!("SCHILY.xattr.{name}"), value)
    }

    /// Mode of the next entries.
    fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Owner of the next entries.
    fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    fn dir(self, path: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Directory, path, |_| (), b"")
    }

    fn file(self, path: impl AsRef<[u8]>, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, |_| (), content)
    }

    fn symlink(self, path: impl AsRef<[u8]>, target: &str) -> Self {
        self.linked(EntryType::Symlink, path, target)
    }

    fn link(self, path: impl AsRef<[u8]>, target: &str) -> Self {
        self.linked(EntryType::Link, path, target)
    }

    fn socket(self, path: &str) -> Self {
        self.record("SCHILY.filetype", "socket").entry(EntryType::Fifo, path, |_| (), b"")
    }

    fn device(self, kind: EntryType, path: &str, major: u32, minor: u32) -> Self {
        let number = |header: &mut Header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        };
        self.entry(kind, path, number, b"")
    }

    fn whiteout(self, path: &str) -> Self {
        self.device(EntryType::Char, path, 0, 0)
    }

    fn sparse(self, path: &str, full: u64, pieces: &[(u64, &[u8])]) -> Self {
        let places: Vec<_> = pieces.iter().map(|(at, bytes)| (*at, bytes.len() as u64)).collect();
        let mut content = machinen_protocol::layer::map(&places);
        pieces.iter().for_each(|(_, bytes)| content.extend_from_slice(bytes));
        let holes = self.record("GNU.sparse.major", "1").record("GNU.sparse.minor", "0");
        holes.record("GNU.sparse.realsize", full.to_string()).file(path, &content)
    }

    fn linked(self, kind: EntryType, path: impl AsRef<[u8]>, target: &str) -> Self {
        let long = target.len() > 100;
        let archive = if long { self.record("linkpath", target) } else { self };
        archive.entry(
            kind,
            path,
            |header| {
                if !long {
                    header.set_link_name_literal(target).unwrap();
                }
            },
            b"",
        )
    }

    fn entry(
        mut self,
        kind: EntryType,
        path: impl AsRef<[u8]>,
        change: impl FnOnce(&mut Header),
        content: &[u8],
    ) -> Self {
        let path = path.as_ref();
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(self.mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(7);
        header.set_size(content.len() as u64);
        if path.len() > 100 {
            self = self.record("path", path);
        } else {
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path);
        }
        change(&mut header);
        if !self.records.is_empty() {
            let mut extended = Header::new_gnu();
            extended.set_entry_type(EntryType::XHeader);
            extended.set_size(self.records.len() as u64);
            extended.set_cksum();
            self.builder.append(&extended, self.records.as_slice()).unwrap();
            self.records.clear();
        }
        header.set_cksum();
        self.builder.append(&header, content).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.builder.into_inner().unwrap()
    }
}

/// A directory to apply archives to, next to files that must not change.
struct LayerFixture {
    dir: tempfile::TempDir,
}

impl LayerFixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "untouched").unwrap();
        Self { dir }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    fn apply(&self, archive: TestArchive) -> Result<AppliedLayer, LayerError> {
        self.apply_bytes(archive.bytes().as_slice())
    }

    fn apply_bytes(&self, archive: impl Read) -> Result<AppliedLayer, LayerError> {
        let root = File::open(self.path("root")).unwrap();
        apply(archive, root.as_fd(), None, LIMITS)
    }

    /// Asserts that nothing outside of the root was made, removed or changed.
    fn assert_contained(&self) {
        let mut names: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["outside", "root"]);
        let outside: Vec<_> = fs::read_dir(self.path("outside")).unwrap().collect();
        assert_eq!(outside.len(), 1);
        let file = self.path("outside/file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "untouched");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&fs::metadata(file).unwrap()), 1);
    }
}

/// Archives from `make`, one after the other without end.
struct Repeated<F> {
    make: F,
    current: io::Cursor<Vec<u8>>,
    number: u64,
}

impl<F: FnMut(u64) -> Vec<u8>> Read for Repeated<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.current.read(buffer)? {
                0 => {
                    self.current = io::Cursor::new((self.make)(self.number));
                    self.number += 1;
                }
                read => return Ok(read),
            }
        }
    }
}
