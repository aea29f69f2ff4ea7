//! Writable disks that start with the content of an upper directory, which a container wrote before.

use std::{
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use machinen_base::{fs::FileError, owner};
use rustix::fs::ftruncate;

use super::{ContainerDiskError, ContainerDiskOptions, blank::parent};
use crate::rootdisk::{
    RootdiskCache, RootdiskError, check_space,
    ext4::{self, BLOCK, INODE},
    mkfs::{CopiedTree, Mke2fs},
    source_mount::SourceMount,
    store,
    tree::SourceTree,
};

/// Bytes of a disk for each inode that it has room for.
const BYTES_PER_INODE: u64 = 16384;
/// Bytes of the journal, rounded up.
const JOURNAL: u64 = 34 << 20;

/// Makes a disk like [`blank::create`](super::blank::create) whose directory `upper` is a copy of `upper`, the
/// upper directory of an overlay, which must not change meanwhile.
///
/// # Errors
/// A file of that name exists, `upper` cannot be read or does not fit, there is no space or no mke2fs.
pub(super) fn create(
    path: &Path,
    upper: &Path,
    options: &ContainerDiskOptions,
) -> Result<File, ContainerDiskError> {
    let dir = parent(path);
    let failed = |source| FileError::new("create", path, source);
    let file = store::unnamed(dir).map_err(failed)?;
    fill(&file, dir, upper, options)?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
    store::name_new_file(&file, path).map_err(failed)?;
    Ok(file)
}

/// As [`create`], but in an unnamed file in the cache's directory.
///
/// # Errors
/// `upper` cannot be read or does not fit, no space or no mke2fs.
pub(super) fn unnamed(upper: &Path, options: &ContainerDiskOptions) -> Result<File, ContainerDiskError> {
    let cache = RootdiskCache::open(&options.cache)?;
    let file = cache.store.unnamed()?;
    fill(&file, cache.dir(), upper, options)?;
    Ok(file)
}

/// Makes a file system in `file`, which is in `dir`, with a copy of `upper` in it.
fn fill(
    file: &File,
    dir: &Path,
    upper: &Path,
    options: &ContainerDiskOptions,
) -> Result<(), ContainerDiskError> {
    let size = options.size.next_multiple_of(BLOCK as u64);
    let mount = SourceMount::of_upper(upper)?;
    let tree = SourceTree::walk(&mount)?;
    let files = tree.files().count() as u64;
    let inodes = (size / BYTES_PER_INODE).max(files + files / 4 + 1024);
    let needed = tree.needed_bytes() + JOURNAL;
    if needed + inodes * INODE as u64 > size {
        return Err(ContainerDiskError::UpperTooLarge { path: upper.to_owned(), needed, size });
    }
    let mke2fs = Mke2fs::find(&options.mke2fs)?;
    check_space(options.reserve, file, dir, needed)?;
    ftruncate(file, size).map_err(|errno| FileError::new("write to", dir, errno))?;
    // The marks of an overlay are such attributes.
    let tree_to_copy = CopiedTree { root: mount.share()?, inodes, needed, has_trusted: true };
    mke2fs.seeded(tree_to_copy, file, dir)?;
    let marks = match owner::user() {
        None => ext4::OriginMarks::Dropped,
        Some(_) => ext4::OriginMarks::DroppedOfUser,
    };
    let finished = ext4::normalise(file, &tree, marks);
    Ok(finished.map_err(|source| RootdiskError::Finish { root: upper.to_owned(), source })?)
}
