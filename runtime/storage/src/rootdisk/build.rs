//! Builds the disk of a source.

use std::{
    fs::File,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use machinen_base::fs::FileError;
use rustix::fs::ftruncate;
use sha2::{Digest as _, Sha256};

use super::{
    BuildOptions, LARGEST, Rootdisk, RootdiskCache, RootdiskError, RootdiskProgress, RootfsSource,
    check_space,
    ext4::{self, BLOCK, INODE},
    hashing::{self, HashedTree},
    key::RootdiskKey,
    lock::Lock,
    mkfs::{CopiedTree, Mke2fs},
    source::Recognised,
    source_mount::SourceMount,
    store::{self, DISK, DiskMetadata, Opened},
    tree::SourceTree,
};

/// Bytes of hashed content between two reports.
const REPORT: u64 = 8 << 20;

type PhaseTimes = Vec<(&'static str, Duration)>;

impl RootdiskCache {
    /// Finds or builds the disk of a root file system. Blocks. Other callers that ask for the same disk wait,
    /// and get what the first one has built.
    ///
    /// # Errors
    /// The source cannot be read or changes meanwhile, the cache's file system is full, mke2fs is missing or
    /// fails. Nothing is left of an incomplete disk.
    pub fn get_or_build(
        &self,
        source: &RootfsSource,
        options: &BuildOptions,
        progress: &mut dyn FnMut(RootdiskProgress),
    ) -> Result<Rootdisk, RootdiskError> {
        let mut phases = PhaseTimes::new();
        let mut recognised = timed(&mut phases, "identity", || source.recognise(options))?;
        if let Some((key, opened)) = self.known(&recognised)? {
            return Ok(self.rootdisk(key, opened, true, phases));
        }
        let _identity = self.lock("identity", recognised.identity, &mut phases, progress)?;
        if let Some((key, opened)) = self.known(&recognised)? {
            return Ok(self.rootdisk(key, opened, true, phases));
        }
        self.store.sweep()?;
        let (mount, tree) = timed(&mut phases, "walk", || recognised.walk())?;
        let shape = tree.shape();
        let _shape = self.lock("shape", shape, &mut phases, progress)?;
        let job = Job { cache: self, source, options, mount, tree, shape: shape.to_string() };
        let (key, opened, cached) = job.run(&recognised, &mut phases, progress)?;
        self.index
            .write(&self.index.dir.join(recognised.identity.to_string()), key.to_string().as_bytes())?;
        Ok(self.rootdisk(key, opened, cached, phases))
    }

    /// The finished disk of that key, if there is one.
    ///
    /// # Errors
    /// The disk cannot be read.
    pub fn get(&self, key: RootdiskKey) -> Result<Option<Rootdisk>, RootdiskError> {
        let opened = self.store.get(&key.to_string())?;
        Ok(opened.map(|opened| self.rootdisk(key, opened, true, PhaseTimes::new())))
    }

    /// The disk of a source according to the index. An index entry that cannot be read is ignored.
    fn known(&self, recognised: &Recognised) -> Result<Option<(RootdiskKey, Opened)>, RootdiskError> {
        let path = self.index.dir.join(recognised.identity.to_string());
        let key = store::read(&path)
            .ok()
            .and_then(|text| String::from_utf8(text).ok()?.parse::<RootdiskKey>().ok());
        match key {
            Some(key) => Ok(self.store.get(&key.to_string())?.map(|opened| (key, opened))),
            None => Ok(None),
        }
    }

    fn lock(
        &self,
        kind: &str,
        key: RootdiskKey,
        phases: &mut PhaseTimes,
        progress: &mut dyn FnMut(RootdiskProgress),
    ) -> Result<Lock, RootdiskError> {
        let path = self.locks.dir.join(format!("{kind}-{key}"));
        let mut since = None;
        let lock = Lock::acquire(&path, || {
            since = Some(Instant::now());
            progress(RootdiskProgress::Waiting);
        });
        phases.extend(since.map(|since| ("wait", since.elapsed())));
        Ok(lock.map_err(FileError::at("lock", path))?)
    }

    fn rootdisk(&self, key: RootdiskKey, opened: Opened, cached: bool, phases: PhaseTimes) -> Rootdisk {
        let path = self.store.path(&key.to_string(), DISK);
        Rootdisk { key, path, file: opened.file, size: opened.metadata.size, cached, phases }
    }

    /// Whether the cache may have a disk of a tree of this shape.
    fn has_shape(&self, shape: &str) -> Result<bool, RootdiskError> {
        for name in self.store.names()? {
            if self.store.metadata(&name)?.is_some_and(|metadata| metadata.shape == shape) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// One conversion, with all locks held.
struct Job<'a> {
    cache: &'a RootdiskCache,
    source: &'a RootfsSource,
    options: &'a BuildOptions,
    mount: SourceMount,
    tree: SourceTree,
    shape: String,
}

impl Job<'_> {
    fn run(
        &self,
        recognised: &Recognised,
        phases: &mut PhaseTimes,
        progress: &mut dyn FnMut(RootdiskProgress),
    ) -> Result<(RootdiskKey, Opened, bool), RootdiskError> {
        let store = &self.cache.store;
        let size = self.size()?;
        let (files, bytes) = (self.tree.files().count() as u64, self.tree.content_bytes());
        progress(RootdiskProgress::Converting { files, bytes });
        let (key, disk) = if self.cache.has_shape(&self.shape)? {
            let mut reports = ProgressReports::new(bytes, &mut *progress);
            let HashedTree { key, has_trusted } =
                timed(phases, "hash", || hashing::hash(&self.mount, &self.tree, size, |n| reports.add(n)))?;
            if let Some(opened) = store.get(&key.to_string())? {
                return Ok((key, opened, true));
            }
            (key, timed(phases, "mke2fs", || self.convert(size, files, has_trusted))?)
        } else {
            self.hash_and_convert(size, files, phases, progress)?
        };
        progress(RootdiskProgress::Finishing);
        let (disk, mke2fs) = disk;
        let finished = timed(phases, "normalise", || {
            ext4::normalise(&disk, &self.tree, ext4::OriginMarks::Kept)
                .and_then(|()| ext4::set_uuid(&disk, uuid(key, &mke2fs)))
        });
        finished.map_err(|source| RootdiskError::Finish { root: self.source.name().to_owned(), source })?;
        if recognised.mutable {
            timed(phases, "check", || self.tree.unchanged(&SourceTree::walk(&self.mount)?))?;
        }
        let mut metadata = DiskMetadata::new(size, self.source.describe(), self.shape.clone(), &mke2fs);
        (metadata.files, metadata.content) = (files, bytes);
        let opened = timed(phases, "publish", || store.publish(&key.to_string(), &disk, metadata))?;
        Ok((key, opened, false))
    }

    /// Hashes on one core while mke2fs runs on another. Both read the same files at about the same time, so
    /// each file is read from the host's disk only once.
    ///
    /// Hardly any tree has attributes that only a privileged process can read. Where hashing finds one, mke2fs runs
    /// again, with that privilege.
    fn hash_and_convert(
        &self,
        size: u64,
        files: u64,
        phases: &mut PhaseTimes,
        progress: &mut dyn FnMut(RootdiskProgress),
    ) -> Result<(RootdiskKey, (File, String)), RootdiskError> {
        let (sender, reports) = mpsc::channel();
        let total = self.tree.content_bytes();
        thread::scope(|scope| {
            let hash = scope.spawn(move || {
                let mut counted = ProgressReports::new(total, |report| {
                    // Sending fails only if the receiving side has panicked.
                    let _ = sender.send(report);
                });
                let start = Instant::now();
                (hashing::hash(&self.mount, &self.tree, size, |n| counted.add(n)), start.elapsed())
            });
            let convert = scope.spawn(|| {
                let start = Instant::now();
                (self.convert(size, files, false), start.elapsed())
            });
            reports.iter().for_each(progress);
            let (hashed, hash_time) = hash.join().expect("hashing does not panic");
            let (disk, convert_time) = convert.join().expect("converting does not panic");
            phases.extend([("hash", hash_time), ("mke2fs", convert_time)]);
            let HashedTree { key, has_trusted } = hashed?;
            match has_trusted {
                true => Ok((key, timed(phases, "mke2fs", || self.convert(size, files, true))?)),
                false => Ok((key, disk?)),
            }
        })
    }

    /// Makes the disk by mke2fs, as an unnamed file. Also returns mke2fs's version. `has_trusted`: as of
    /// [`HashedTree`].
    fn convert(&self, size: u64, files: u64, has_trusted: bool) -> Result<(File, String), RootdiskError> {
        let store = &self.cache.store;
        let mke2fs = Mke2fs::find(&self.options.mke2fs)?;
        let disk = store.unnamed()?;
        let failed = |error: rustix::io::Errno| FileError::new("write to", &store.dir, error);
        ftruncate(&disk, size).map_err(failed)?;
        // Two bitmaps for each group of 128 MiB.
        let needed = self.tree.needed_bytes() + size / (128 << 20) * 2 * BLOCK as u64 + (1 << 20);
        check_space(self.options.reserve, &disk, &store.dir, needed)?;
        // The first ten inodes are reserved, the eleventh is lost+found.
        let tree = CopiedTree { root: self.mount.share()?, inodes: files + 16, needed, has_trusted };
        mke2fs.base(tree, &disk, &store.dir)?;
        Ok((disk, mke2fs.version))
    }

    /// 2.5 times the size of the tree, which leaves room for the file system's own structures; at least
    /// `min_size`.
    fn size(&self) -> Result<u64, RootdiskError> {
        let tree = self.tree.disk_bytes() + (16 * INODE + 64 * BLOCK) as u64;
        let size = (tree.saturating_mul(5) / 2).max(self.options.min_size).next_multiple_of(BLOCK as u64);
        if size > LARGEST - (1 << 30) { Err(RootdiskError::TooLarge { size }) } else { Ok(size) }
    }
}

/// The UUID of a layout: what a guest has recorded about inode numbers is not valid on a disk of the same
/// files that another version of mke2fs has made.
fn uuid(key: RootdiskKey, mke2fs: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(format!("machinen base {key} {mke2fs}")).into();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    // Version and variant of a UUID that is neither random nor made of a time (RFC 9562, version 8).
    uuid[6] = 0x80 | uuid[6] & 0x0f;
    uuid[8] = 0x80 | uuid[8] & 0x3f;
    uuid
}

/// Turns many small steps into few reports.
struct ProgressReports<F> {
    report: F,
    done: u64,
    reported: u64,
    total: u64,
}

impl<F: FnMut(RootdiskProgress)> ProgressReports<F> {
    fn new(total: u64, report: F) -> Self {
        Self { report, done: 0, reported: 0, total }
    }

    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.done - self.reported >= REPORT || self.done == self.total {
            self.reported = self.done;
            (self.report)(RootdiskProgress::Hashed { done: self.done, total: self.total });
        }
    }
}

fn timed<T>(phases: &mut PhaseTimes, name: &'static str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    phases.push((name, start.elapsed()));
    result
}
