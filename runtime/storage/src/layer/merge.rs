//! Merges a container's changes into a directory that stays in place.
//!
//! ```text
//!   archive ──apply──> staging directory, with overlayfs's marks ──merge──> directory
//! ```
//! The staging directory is on the file system of the directory, so each file gets its place by one rename(2). The
//! whole archive has been checked before the directory is touched. A process that dies in the middle leaves a part of
//! the changes there; the container's disk has all of them, and the merge at the end of the next container completes
//! them.
//!
//! No symbolic link is followed, and no mount point crossed, in either directory: what is mounted in the directory was
//! not part of the container's root file system.

use std::{
    ffi::CStr,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use machinen_base::fs::{FileError, lock};
use machinen_protocol::layer::travels;
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, Stat, Timestamps, Uid, fchmod, fchown, fgetxattr, flistxattr,
        fremovexattr, fstat, futimens, makedev, mkdirat, mknodat, renameat, statat, unlinkat,
    },
    io::Errno,
};

use super::{
    LayerError,
    apply::{directory_flags, opaque_mark, open_dir, set_xattr, times, write_error},
    archive::Components,
    lower::XATTR_MAX,
};

/// Moves everything from `staged` to its place in the directory `target`, removes from there what the marks say, and
/// gives the directories their metadata. Merges into one directory wait for each other.
///
/// # Errors
/// A file cannot be moved or removed. Some of the changes are in `target` then.
pub(super) fn merge(staged: BorrowedFd<'_>, target: &Path) -> Result<(), LayerError> {
    let opened = rustix::fs::open(target, directory_flags(), Mode::empty());
    let opened = File::from(opened.map_err(|errno| FileError::new("open", target, errno))?);
    lock(&opened).map_err(FileError::at("lock", target))?;
    Merge { staged, target: opened.as_fd() }.directory(&mut Components::new())
}

/// Whether overlayfs's mark of a removed file.
pub(super) fn is_mark(status: &Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice && status.st_rdev == 0
}

struct Merge<'a> {
    staged: BorrowedFd<'a>,
    target: BorrowedFd<'a>,
}

impl Merge<'_> {
    /// Merges the directory at `path`, which both sides have. One descriptor is open for each level.
    fn directory(&self, path: &mut Components) -> Result<(), LayerError> {
        let staged = self.open_staged(path)?;
        // The time of the directory is taken before its files are moved away.
        let status = fstat(&staged).map_err(failed("examine", path))?;
        if is_opaque(staged.as_fd()).map_err(failed("read the attributes of", path))? {
            empty(self.open_target(path)?.as_fd()).map_err(failed("empty", path))?;
        }
        let entries = Dir::new(staged).map_err(failed("list", path))?;
        for item in entries {
            let item = item.map_err(failed("list", path))?;
            let name = item.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            path.push(name.to_bytes().to_vec());
            self.entry(path, name)?;
            path.pop();
        }
        let (staged, target) = (self.open_staged(path)?, self.open_target(path)?);
        copy_metadata(staged.as_fd(), &status, target.as_fd()).map_err(failed("set the attributes of", path))
    }

    fn entry(&self, path: &mut Components, name: &CStr) -> Result<(), LayerError> {
        let parents = &path[..path.len() - 1];
        let (staged, target) = (self.open_staged(parents)?, self.open_target(parents)?);
        let status = statat(&staged, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("examine", path))?;
        if is_mark(&status) {
            return remove(target.as_fd(), name).map_err(failed("remove", path));
        }
        let old = match statat(&target, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => None,
            old => Some(is_directory(&old.map_err(failed("examine", path))?)),
        };
        let is_directory = is_directory(&status);
        if old.is_some_and(|old| old != is_directory) {
            remove(target.as_fd(), name).map_err(failed("remove", path))?;
        }
        if !is_directory {
            return renameat(&staged, name, &target, name).map_err(failed("put in place", path));
        }
        if old != Some(true) {
            mkdirat(&target, name, Mode::RWXU).map_err(failed("create", path))?;
        }
        drop((staged, target));
        self.directory(path)
    }

    fn open_staged(&self, path: &[Vec<u8>]) -> Result<OwnedFd, LayerError> {
        open_dir(self.staged, path, directory_flags()).map_err(failed("open", path))
    }

    fn open_target(&self, path: &[Vec<u8>]) -> Result<OwnedFd, LayerError> {
        open_dir(self.target, path, directory_flags()).map_err(failed("open", path))
    }
}

fn failed(action: &'static str, path: &[Vec<u8>]) -> impl Fn(Errno) -> LayerError {
    move |errno| write_error(action, path, errno.into())
}

fn is_directory(status: &Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::Directory
}

fn is_opaque(dir: BorrowedFd<'_>) -> Result<bool, Errno> {
    match fgetxattr(dir, opaque_mark(), &mut [0_u8; 8][..]) {
        Ok(_) | Err(Errno::RANGE) => Ok(true),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Removes a file, or a directory with its content. It may be missing.
fn remove(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(errno),
    }
    empty(open_dir(dir, &[name.to_bytes().to_vec()], directory_flags())?.as_fd())?;
    unlinkat(dir, name, AtFlags::REMOVEDIR)
}

/// Removes everything that is in a directory.
fn empty(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    for item in Dir::read_from(dir)? {
        let item = item?;
        if !matches!(item.file_name().to_bytes(), b"." | b"..") {
            remove(dir, item.file_name())?;
        }
    }
    Ok(())
}

/// Gives `target` the owner, mode and time of `status`, and the attributes of `staged`. Attributes that a container cannot have, such as
/// those of security modules of the host, are left as they are.
pub(super) fn copy_metadata(
    staged: BorrowedFd<'_>,
    status: &Stat,
    target: BorrowedFd<'_>,
) -> Result<(), Errno> {
    fchown(target, Some(Uid::from_raw(status.st_uid)), Some(Gid::from_raw(status.st_gid)))?;
    fchmod(target, Mode::from_raw_mode(status.st_mode & 0o7777))?;
    let (wanted, present) = (attributes(staged)?, attributes(target)?);
    let keys = |list: &[u8]| -> Vec<Vec<u8>> {
        let keys =
            list.split(|&byte| byte == 0).filter(|key| travels(key) && *key != opaque_mark().to_bytes());
        keys.map(<[u8]>::to_vec).collect()
    };
    let wanted = keys(&wanted);
    for key in keys(&present).iter().filter(|key| !wanted.contains(key)) {
        fremovexattr(target, key.as_slice())?;
    }
    for key in wanted {
        let mut value = Vec::with_capacity(XATTR_MAX);
        fgetxattr(staged, key.as_slice(), rustix::buffer::spare_capacity(&mut value))?;
        let key = std::ffi::CString::new(key).map_err(|_| Errno::INVAL)?;
        set_xattr(target, &key, &value)?;
    }
    futimens(target, &modified(status))
}

/// The names of a file's attributes, each with a final zero.
fn attributes(file: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut keys = Vec::with_capacity(XATTR_MAX);
    match flistxattr(file, rustix::buffer::spare_capacity(&mut keys)) {
        Ok(_) | Err(Errno::OPNOTSUPP) => Ok(keys),
        Err(errno) => Err(errno),
    }
}

/// Makes overlayfs's mark of a removed file. The time of the directory stays.
pub(super) fn mark(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let status = fstat(dir)?;
    mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), makedev(0, 0))?;
    futimens(dir, &modified(&status))
}

fn modified(status: &Stat) -> Timestamps {
    times((status.st_mtime, status.st_mtime_nsec as u32))
}
