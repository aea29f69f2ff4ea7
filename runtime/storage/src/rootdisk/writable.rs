//! Writable layers: file systems for the guest to write to, empty or with what a container wrote before.
//!
//! mke2fs takes 20 ms and four fsync(2)s, so it runs once for each size and its result is cached as a
//! *blank*. A new layer is a sparse file with the few blocks (some 300 KiB) that mke2fs wrote to the blank.
//! Nothing needs to be synced here: when the guest syncs later, all blocks of the file that are in memory are
//! written too.

use std::{
    fs::{File, Permissions},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileExt as _, PermissionsExt as _},
    },
    path::Path,
};

use machinen_base::fs::FileError;
use rustix::{
    fs::{SeekFrom, ftruncate, ioctl_ficlone, seek},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::{
    LARGEST, RootdiskCache, RootdiskError,
    ext4::{self, BLOCK, INODE},
    key::RootdiskKey,
    lock::Lock,
    mkfs::Mke2fs,
    source_mount::SourceMount,
    store::{self, DiskMetadata},
    tree::SourceTree,
};

/// Part of a blank's name: raise it when blanks are made in another way.
const FORMAT: u32 = 1;
/// More data than any blank has; one of 16 TiB has 60 MiB.
const DATA_MAX: u64 = 256 << 20;

/// Bytes of a layer for each inode that it has room for.
const BYTES_PER_INODE: u64 = 16384;
/// Bytes of the journal, rounded up.
const JOURNAL: u64 = 34 << 20;

/// The parts of a blank that are not holes.
struct BlankData {
    pieces: Vec<(u64, Vec<u8>)>,
    digest: RootdiskKey,
}

impl RootdiskCache {
    /// Makes an empty writable layer: a sparse ext4 file system of `size` bytes (rounded up to whole blocks)
    /// with a journal, open for reading and writing. The file gets its name when it is complete.
    ///
    /// # Errors
    /// A file of that name exists (see [`open_writable`]), there is no space or no mke2fs.
    pub fn create_writable(&self, path: &Path, size: u64, mke2fs: &Path) -> Result<File, RootdiskError> {
        let size = size.next_multiple_of(BLOCK as u64);
        if size > LARGEST - (1 << 30) {
            return Err(RootdiskError::TooLarge { size });
        }
        let data = self.blank(size, mke2fs)?;
        let failed = |source| RootdiskError::Writable { path: path.to_owned(), source };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let make = || -> io::Result<File> {
            let file = store::unnamed(dir)?;
            ftruncate(&file, size)?;
            for (offset, bytes) in &data.pieces {
                file.write_all_at(bytes, *offset)?;
            }
            file.set_permissions(Permissions::from_mode(0o600))?;
            store::name_new_file(&file, path)?;
            Ok(file)
        };
        make().map_err(failed)
    }

    /// Makes an empty file system like a writable layer's, in an unnamed file in the cache's directory, which
    /// is gone with its last descriptor.
    ///
    /// # Errors
    /// No space or no mke2fs.
    pub fn unnamed_writable(&self, size: u64, mke2fs: &Path) -> Result<File, RootdiskError> {
        let size = size.next_multiple_of(BLOCK as u64);
        let data = self.blank(size, mke2fs)?;
        let file = self.store.unnamed()?;
        let make = || -> io::Result<()> {
            ftruncate(&file, size)?;
            data.pieces.iter().try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))
        };
        make().map_err(FileError::at("write to", &self.store.dir))?;
        Ok(file)
    }

    /// Makes a file system with the files of a flat directory, in an unnamed file in the cache's directory
    /// that is open for reading. `bytes` is the size of the files in whole blocks.
    ///
    /// # Errors
    /// No space or no mke2fs.
    pub fn disk_of_files(
        &self,
        dir: OwnedFd,
        files: u64,
        bytes: u64,
        mke2fs: &Path,
    ) -> Result<File, RootdiskError> {
        let inodes = files + files / 4 + 64;
        let size = (bytes + bytes / 64 + inodes * INODE as u64 + (16 << 20)).next_multiple_of(BLOCK as u64);
        let mke2fs = Mke2fs::find(mke2fs)?;
        let file = self.store.unnamed()?;
        ftruncate(&file, size).map_err(|error| FileError::new("write to", &self.store.dir, error))?;
        mke2fs.base(dir, &file, &self.store.dir, inodes, bytes)?;
        // A read-only disk must be passed to QEMU as a read-only descriptor.
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(read_only.map_err(FileError::at("open a disk in", &self.store.dir))?)
    }

    /// Makes a writable layer like [`RootdiskCache::create_writable`] whose directory `upper` is a copy of
    /// `upper`, the upper directory of an overlay, which must not change meanwhile.
    ///
    /// # Errors
    /// A file of that name exists, `upper` cannot be read or does not fit, there is no space or no mke2fs.
    pub fn seed_writable(
        &self,
        path: &Path,
        size: u64,
        upper: &Path,
        mke2fs: &Path,
    ) -> Result<File, RootdiskError> {
        let failed = |source| RootdiskError::Writable { path: path.to_owned(), source };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = store::unnamed(dir).map_err(failed)?;
        seed(&file, dir, size, upper, mke2fs)?;
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        store::name_new_file(&file, path).map_err(failed)?;
        Ok(file)
    }

    /// As [`RootdiskCache::seed_writable`], but in an unnamed file in the cache's directory.
    ///
    /// # Errors
    /// `upper` cannot be read or does not fit, no space or no mke2fs.
    pub fn unnamed_seeded(&self, size: u64, upper: &Path, mke2fs: &Path) -> Result<File, RootdiskError> {
        let file = self.store.unnamed()?;
        seed(&file, &self.store.dir, size, upper, mke2fs)?;
        Ok(file)
    }

    /// Copies a disk, which must not be written to meanwhile, to an unnamed file in the cache's directory.
    /// The copy shares the disk's blocks where the file system can, and keeps its holes.
    ///
    /// # Errors
    /// The disk cannot be read, or no space.
    pub fn unnamed_copy(&self, disk: &Path) -> Result<File, RootdiskError> {
        let failed = |source| RootdiskError::Writable { path: disk.to_owned(), source };
        let from = File::open(disk).map_err(failed)?;
        let file = self.store.unnamed()?;
        copy_data(&from, &file).map_err(failed)?;
        Ok(file)
    }

    /// The content of a new layer of that size. It is made by mke2fs if the cache has no undamaged blank of
    /// that size.
    fn blank(&self, size: u64, mke2fs: &Path) -> Result<BlankData, RootdiskError> {
        let name = format!("v{FORMAT}-{size}");
        if let Some(data) = self.cached_blank(&name)? {
            return Ok(data);
        }
        let path = self.locks.dir.join(format!("writable-{name}"));
        let _lock = Lock::acquire(&path, || ()).map_err(FileError::at("lock", &path))?;
        if let Some(data) = self.cached_blank(&name)? {
            return Ok(data);
        }
        self.blanks.sweep()?;
        let mke2fs = Mke2fs::find(mke2fs)?;
        let file = self.blanks.unnamed()?;
        let failed = |error: io::Error| FileError::new("write to", &self.blanks.dir, error);
        ftruncate(&file, size).map_err(|error| failed(error.into()))?;
        mke2fs.writable(&file, size, &self.blanks.dir)?;
        let data = data(&file, size).map_err(failed)?;
        let metadata = DiskMetadata::new(
            size,
            "an empty writable layer".to_owned(),
            data.digest.to_string(),
            &mke2fs.version,
        );
        self.blanks.publish(&name, &file, metadata)?;
        Ok(data)
    }

    fn cached_blank(&self, name: &str) -> Result<Option<BlankData>, RootdiskError> {
        let Some(opened) = self.blanks.get(name)? else { return Ok(None) };
        let data = data(&opened.file, opened.metadata.size)
            .map_err(FileError::at("read", self.blanks.path(name, store::DISK)))?;
        Ok((data.digest.to_string() == opened.metadata.shape).then_some(data))
    }
}

/// Opens the layer that a container wrote to before.
///
/// # Errors
/// It does not exist, or is not what [`RootdiskCache::create_writable`] makes.
pub fn open_writable(path: &Path) -> Result<File, RootdiskError> {
    let failed = |source| RootdiskError::Writable { path: path.to_owned(), source };
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    let other = |what: &str| RootdiskError::NotWritable { path: path.to_owned(), what: what.to_owned() };
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => other("is too short"),
        _ => failed(error),
    })?;
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return Err(other("is not an ext4 file system"));
    }
    Ok(file)
}

/// Makes a file system of `size` bytes in `file`, which is in `dir`, with a copy of `upper` in it.
fn seed(file: &File, dir: &Path, size: u64, upper: &Path, mke2fs: &Path) -> Result<(), RootdiskError> {
    let size = size.next_multiple_of(BLOCK as u64);
    let failed = |source| RootdiskError::Writable { path: dir.to_owned(), source };
    let mount = SourceMount::of_upper(upper)?;
    let tree = SourceTree::walk(&mount)?;
    let files = tree.files().count() as u64;
    let inodes = (size / BYTES_PER_INODE).max(files + files / 4 + 1024);
    let needed = tree.needed_bytes() + JOURNAL;
    if needed + inodes * INODE as u64 > size {
        return Err(RootdiskError::UpperTooLarge { path: upper.to_owned(), needed, size });
    }
    let mke2fs = Mke2fs::find(mke2fs)?;
    ftruncate(file, size).map_err(|error| failed(error.into()))?;
    mke2fs.seeded(mount.share()?, file, dir, inodes, needed)?;
    let finished = ext4::normalise(file, &tree, ext4::OriginMarks::Dropped);
    finished.map_err(|source| RootdiskError::Finish { root: upper.to_owned(), source })
}

/// Copies the parts of a file that are not holes to an empty file.
fn copy_data(mut from: &File, mut to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = from.metadata()?.len();
    ftruncate(to, size)?;
    let mut offset = 0;
    loop {
        let start = match seek(from, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(size);
        seek(from, SeekFrom::Start(start))?;
        seek(to, SeekFrom::Start(start))?;
        if io::copy(&mut io::Read::take(&mut from, end - start), &mut to)? != end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = end;
    }
}

fn data(file: &File, size: u64) -> io::Result<BlankData> {
    let (mut pieces, mut digest, mut offset, mut total) = (Vec::new(), Sha256::new(), 0, 0);
    loop {
        let start = match seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        total += end - start;
        if total > DATA_MAX {
            return Err(io::Error::other("the blank has too much data"));
        }
        // Blocks of zeros, which the cache's file system did not keep as holes, need not be written.
        for at in (start..end).step_by(BLOCK) {
            let mut bytes = vec![0; BLOCK.min((end - at) as usize)];
            file.read_exact_at(&mut bytes, at)?;
            if bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            digest.update(at.to_le_bytes());
            digest.update(&bytes);
            pieces.push((at, bytes));
        }
        offset = end;
    }
    Ok(BlankData { pieces, digest: RootdiskKey::new(digest.finalize().into()) })
}
