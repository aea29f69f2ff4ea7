//! overlayfs's marks on copied-up files, which identify the file in the lower layer by its handle.
//!
//! A handle is valid on one lower file system. An overlay with an index merges a directory only with the
//! lower directory that its mark identifies: a mark from another file system would hide the lower files.
//! Without a mark, directories are merged by name, and the kernel sets the mark anew.

use std::{fs, io, path::Path};

use rustix::{
    fs::{lgetxattr, lremovexattr},
    io::Errno,
};

const MARK: &str = "trusted.overlay.origin";

/// Whether the upper directory itself has a mark, which the kernel sets when the overlay is mounted with an
/// index.
///
/// # Errors
/// Those of getxattr(2).
pub(super) fn is_marked(upper: &Path) -> io::Result<bool> {
    match lgetxattr(upper, MARK, &mut [0_u8; 0]) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// Removes all marks of an upper directory.
///
/// # Errors
/// Those of the file system.
pub(super) fn forget(upper: &Path) -> io::Result<()> {
    let mut pending = vec![upper.to_owned()];
    while let Some(path) = pending.pop() {
        match lremovexattr(&path, MARK) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(err) => return Err(err.into()),
        }
        if !fs::symlink_metadata(&path)?.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path)? {
            pending.push(entry?.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::fs::{XattrFlags, lsetxattr};

    use super::*;

    #[test]
    fn no_mark_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path();
        fs::create_dir_all(upper.join("etc/deep")).unwrap();
        fs::write(upper.join("etc/deep/file"), "x").unwrap();
        let marked = ["", "etc", "etc/deep/file"];
        for path in marked {
            match lsetxattr(upper.join(path), MARK, b"handle", XattrFlags::CREATE) {
                Err(Errno::OPNOTSUPP | Errno::PERM) => {
                    panic!("this test wants root, and a disk for temporary files")
                }
                set => set.unwrap(),
            }
        }
        lsetxattr(upper.join("etc"), "trusted.overlay.opaque", b"y", XattrFlags::CREATE).unwrap();
        assert!(is_marked(upper).unwrap());
        forget(upper).unwrap();
        for path in marked {
            assert!(!is_marked(&upper.join(path)).unwrap(), "{path:?}");
        }
        // Others stay.
        assert_eq!(lgetxattr(upper.join("etc"), "trusted.overlay.opaque", &mut [0_u8; 8]).unwrap(), 1);
    }
}
