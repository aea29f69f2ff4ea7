//! Copies a container's disk to one without a name.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use machinen_base::fs::FileError;
use rustix::{
    fs::{SeekFrom, ftruncate, ioctl_ficlone, seek},
    io::Errno,
};

use super::ContainerDiskError;
use crate::rootdisk::RootdiskCache;

/// Copies a disk, which must not be written to meanwhile, to an unnamed file in the directory `cache`. The
/// copy shares the disk's blocks where the file system can, and keeps its holes. Blocks.
///
/// # Errors
/// The disk cannot be read, or no space.
pub fn unnamed_copy(disk: &Path, cache: &Path) -> Result<File, ContainerDiskError> {
    let cache = RootdiskCache::open(cache)?;
    let from = File::open(disk).map_err(FileError::at("open", disk))?;
    let file = cache.store.unnamed()?;
    copy_data(&from, &file).map_err(FileError::at("copy", disk))?;
    Ok(file)
}

/// Copies the parts of a file that are not holes to an empty file.
fn copy_data(from: &File, mut to: &File) -> io::Result<()> {
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
        if io::copy(&mut from.take(end - start), &mut to)? != end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = end;
    }
}
