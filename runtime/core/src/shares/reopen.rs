//! Opens the file of a node anew. The library that serves the files keeps its descriptors to itself.

use std::{io, os::fd::OwnedFd};

use fuse_backend_rs::{
    api::filesystem::{Context, FileSystem as _},
    passthrough::PassthroughFs,
};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, open, openat2};

/// Opens a file by the name that it has now below the directory `root`. It is the node's file, and no other under the
/// same name.
///
/// # Errors
/// The file has no name any more, or another one by now; or those of openat2(2).
pub(super) fn reopen(files: &PassthroughFs, root: &str, node: u64, flags: OFlags) -> io::Result<OwnedFd> {
    let path = files.readlinkat_proc_file(node)?;
    let below = path.strip_prefix(root).map_err(|_| io::Error::from_raw_os_error(libc::ENOENT))?;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = openat2(&root, below, flags, Mode::empty(), resolve)?;
    let (found, (wanted, _)) = (fstat(&file)?, files.getattr(&Context::new(), node, None)?);
    if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino) {
        return Err(io::Error::from_raw_os_error(libc::ESTALE));
    }
    Ok(file)
}
