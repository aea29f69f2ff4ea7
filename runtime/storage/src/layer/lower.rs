//! The root file system that an archive changes. Files that the guest did not touch are taken from it.
//!
//! The two trees share files by hard links while both exist, so that adding a file costs only the time for
//! its name. Shared files are never written to, because the archive has whole files under names of their own.

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, fchmod, fchown, fgetxattr, flistxattr, fstat,
        futimens, linkat, mkdirat, openat, statat, unlinkat,
    },
    io::Errno,
};

use super::{
    LayerError,
    apply::{directory_flags, open_dir, set_xattr, times, write_error},
};

/// Most bytes of an attribute's value, and of the list of names (xattr(7)).
pub(super) const XATTR_MAX: usize = 64 << 10;

pub(super) struct Lower<'a> {
    root: BorrowedFd<'a>,
}

impl<'a> Lower<'a> {
    pub(super) fn new(root: BorrowedFd<'a>) -> Self {
        Self { root }
    }

    pub(super) fn has_dir(&self, path: &[Vec<u8>]) -> Result<bool, LayerError> {
        match open_dir(self.root, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC)
        {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(false),
            Err(errno) => Err(write_error("find", path, errno.into())),
        }
    }

    /// Adds the lower files that are missing in a directory whose entries have all arrived, and removes the
    /// marks of removed files.
    pub(super) fn complete(
        &self,
        fresh: BorrowedFd<'_>,
        path: &[Vec<u8>],
        merged: bool,
    ) -> Result<(), LayerError> {
        let failed = |action| move |errno: Errno| write_error(action, path, errno.into());
        if merged {
            let lower = open_dir(self.root, path, directory_flags()).map_err(failed("open"))?;
            for name in names(lower.as_fd()).map_err(failed("list"))? {
                match statat(fresh, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => copy(lower.as_fd(), &name, fresh).map_err(failed("complete"))?,
                    found => drop(found.map_err(failed("examine"))?),
                }
            }
        }
        for item in Dir::read_from(fresh).map_err(failed("list"))? {
            let item = item.map_err(failed("list"))?;
            if item.file_type() != FileType::CharacterDevice {
                continue;
            }
            let status =
                statat(fresh, item.file_name(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed("examine"))?;
            if status.st_rdev == 0 {
                unlinkat(fresh, item.file_name(), AtFlags::empty()).map_err(failed("remove a mark from"))?;
            }
        }
        Ok(())
    }
}

/// Makes a hard link to a file, or a new directory with links to the files in it.
fn copy(from: BorrowedFd<'_>, name: &CStr, to: BorrowedFd<'_>) -> Result<(), Errno> {
    let status = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
        return linkat(from, name, to, name, AtFlags::empty());
    }
    let source = openat(from, name, directory_flags(), Mode::empty())?;
    mkdirat(to, name, Mode::RWXU)?;
    let copied = openat(to, name, directory_flags(), Mode::empty())?;
    for name in names(source.as_fd())? {
        copy(source.as_fd(), &name, copied.as_fd())?;
    }
    copy_metadata(copied.as_fd(), source.as_fd(), &fstat(&source)?)
}

fn copy_metadata(copied: BorrowedFd<'_>, source: BorrowedFd<'_>, status: &Stat) -> Result<(), Errno> {
    fchown(copied, Some(Uid::from_raw(status.st_uid)), Some(Gid::from_raw(status.st_gid)))?;
    fchmod(copied, Mode::from_raw_mode(status.st_mode & 0o7777))?;
    let mut keys = Vec::with_capacity(XATTR_MAX);
    match flistxattr(source, rustix::buffer::spare_capacity(&mut keys)) {
        Ok(_) | Err(Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno),
    }
    for key in keys.split_inclusive(|&byte| byte == 0).filter_map(|key| CStr::from_bytes_with_nul(key).ok()) {
        let mut value = Vec::with_capacity(XATTR_MAX);
        fgetxattr(source, key, rustix::buffer::spare_capacity(&mut value))?;
        set_xattr(copied, key, &value)?;
    }
    futimens(copied, &times((status.st_mtime, status.st_mtime_nsec as u32)))
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<std::ffi::CString>, Errno> {
    let mut names = Vec::new();
    for item in Dir::read_from(dir)? {
        let item = item?;
        if !matches!(item.file_name().to_bytes(), b"." | b"..") {
            names.push(item.file_name().to_owned());
        }
    }
    Ok(names)
}
