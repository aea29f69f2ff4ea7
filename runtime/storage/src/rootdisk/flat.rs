//! Makes a disk of a few files that is used once and is not cached.

use std::{
    fs::File,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use machinen_base::{
    fs::FileError,
    mounts::{TreeOptions, clone_tree},
};
use rustix::fs::ftruncate;

use super::{
    RootdiskCache, RootdiskError,
    ext4::{BLOCK, INODE},
    mkfs::{CopiedTree, Mke2fs},
};

impl RootdiskCache {
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
        // Of a mount, unlike of a directory, mke2fs does not reach what is above it.
        let options = TreeOptions { recursive: false, read_only: true, follows_host: false };
        let root =
            clone_tree(dir.as_fd(), options).map_err(FileError::at("copy files to", &self.store.dir))?;
        let inodes = files + files / 4 + 64;
        let size = (bytes + bytes / 64 + inodes * INODE as u64 + (16 << 20)).next_multiple_of(BLOCK as u64);
        let mke2fs = Mke2fs::find(mke2fs)?;
        let file = self.store.unnamed()?;
        ftruncate(&file, size).map_err(|error| FileError::new("write to", &self.store.dir, error))?;
        let tree = CopiedTree { root, inodes, needed: bytes, has_trusted: false };
        mke2fs.base(tree, &file, &self.store.dir)?;
        // A read-only disk must be passed to QEMU as a read-only descriptor.
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(read_only.map_err(FileError::at("open a disk in", &self.store.dir))?)
    }
}
