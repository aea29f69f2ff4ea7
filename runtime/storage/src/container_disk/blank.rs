//! Empty writable disks: sparse ext4 file systems with a journal.
//!
//! mke2fs takes 20 ms and four fsync(2)s, so it runs once for each size and its result is cached as a
//! *blank*. A new disk is a sparse file with the few blocks (some 300 KiB) that mke2fs wrote to the blank.
//! Nothing needs to be synced here: when the guest syncs later, all blocks of the file that are in memory are
//! written too.

use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
};

use machinen_base::fs::FileError;
use rustix::{
    fs::{SeekFrom, ftruncate, seek},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

use super::{ContainerDiskError, ContainerDiskOptions};
use crate::rootdisk::{
    DiskMetadata, LARGEST, RootdiskCache, RootdiskError, RootdiskKey, check_space, ext4::BLOCK, lock::Lock,
    mkfs::Mke2fs, store,
};

/// Part of a blank's name: raise it when blanks are made in another way.
const FORMAT: u32 = 1;
/// More data than any blank has; one of 16 TiB has 60 MiB.
const DATA_MAX: u64 = 256 << 20;
/// What a new disk can take at once, bytes. What its guest writes is watched (`machinen_vm::DiskSpec`).
const LEAST: u64 = 1 << 20;

/// Makes an empty disk of the configured size (rounded up to whole blocks), open for reading and writing. The
/// file gets its name when it is complete.
///
/// # Errors
/// A file of that name exists, there is no space or no mke2fs.
pub(super) fn create(path: &Path, options: &ContainerDiskOptions) -> Result<File, ContainerDiskError> {
    let size = options.size.next_multiple_of(BLOCK as u64);
    if size > LARGEST - (1 << 30) {
        return Err(RootdiskError::TooLarge { size }.into());
    }
    let blank = Blank::of_size(&RootdiskCache::open(&options.cache)?, size, &options.mke2fs)?;
    let failed = FileError::at("create", path);
    let file = store::unnamed(parent(path)).map_err(failed)?;
    check_space(options.reserve, &file, parent(path), LEAST)?;
    let make = || -> io::Result<File> {
        blank.write_to(&file, size)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        store::name_new_file(&file, path)?;
        Ok(file)
    };
    Ok(make().map_err(FileError::at("create", path))?)
}

/// Makes an empty disk of the configured size in an unnamed file in the cache's directory, which is gone with
/// its last descriptor. Blocks.
///
/// # Errors
/// No space or no mke2fs.
pub fn scratch(options: &ContainerDiskOptions) -> Result<File, ContainerDiskError> {
    let size = options.size.next_multiple_of(BLOCK as u64);
    let cache = RootdiskCache::open(&options.cache)?;
    let blank = Blank::of_size(&cache, size, &options.mke2fs)?;
    let file = cache.store.unnamed()?;
    check_space(options.reserve, &file, cache.dir(), LEAST)?;
    blank.write_to(&file, size).map_err(FileError::at("write to", cache.dir()))?;
    Ok(file)
}

/// The directory of a file.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The parts of a blank that are not holes.
struct Blank {
    pieces: Vec<(u64, Vec<u8>)>,
    digest: RootdiskKey,
}

impl Blank {
    /// The content of a new disk of that size. It is made by mke2fs if the cache has no undamaged blank of
    /// that size.
    fn of_size(cache: &RootdiskCache, size: u64, mke2fs: &Path) -> Result<Self, RootdiskError> {
        let name = format!("v{FORMAT}-{size}");
        if let Some(blank) = Self::cached(cache, &name)? {
            return Ok(blank);
        }
        let path = cache.locks.dir.join(format!("writable-{name}"));
        let _lock = Lock::acquire(&path, || ()).map_err(FileError::at("lock", &path))?;
        if let Some(blank) = Self::cached(cache, &name)? {
            return Ok(blank);
        }
        cache.blanks.sweep()?;
        let mke2fs = Mke2fs::find(mke2fs)?;
        let file = cache.blanks.unnamed()?;
        let failed = |error: io::Error| FileError::new("write to", &cache.blanks.dir, error);
        ftruncate(&file, size).map_err(|error| failed(error.into()))?;
        mke2fs.writable(&file, size, &cache.blanks.dir)?;
        let blank = Self::read(&file, size).map_err(failed)?;
        let source = "an empty writable layer".to_owned();
        let metadata = DiskMetadata::new(size, source, blank.digest.to_string(), &mke2fs.version);
        cache.blanks.publish(&name, &file, metadata)?;
        Ok(blank)
    }

    fn cached(cache: &RootdiskCache, name: &str) -> Result<Option<Self>, RootdiskError> {
        let Some(opened) = cache.blanks.get(name)? else { return Ok(None) };
        let blank = Self::read(&opened.file, opened.metadata.size)
            .map_err(FileError::at("read", cache.blanks.path(name, store::DISK)))?;
        Ok((blank.digest.to_string() == opened.metadata.shape).then_some(blank))
    }

    fn read(file: &File, size: u64) -> io::Result<Self> {
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
        Ok(Self { pieces, digest: RootdiskKey::new(digest.finalize().into()) })
    }

    /// Makes an empty file a disk of that size.
    fn write_to(&self, file: &File, size: u64) -> io::Result<()> {
        ftruncate(file, size)?;
        self.pieces.iter().try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))
    }
}
