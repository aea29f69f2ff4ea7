//! Fills a tmpfs of a container with what the image has in its place (runc's mount option `tmpcopyup`).

use std::{
    fs::{self, File, Metadata},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{
            FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, lchown,
            symlink,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    sys::stat::{Mode, SFlag, mknod},
    unistd::Pid,
};
use pathrs::Root;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyUpError {
    #[error("cannot copy {path} of the image to the tmpfs on it")]
    Copy { path: PathBuf, source: io::Error },
    #[error("cannot open {path} to copy it to the tmpfs on it")]
    Open { path: PathBuf, source: pathrs::error::Error },
}

/// Copies the directories at `destinations` of the root file system `rootfs` to where the container's init has them,
/// which waits. A directory that the image does not have stays empty.
///
/// # Errors
/// A file cannot be read, or does not fit into the tmpfs.
pub(super) fn copy_up(rootfs: &Path, init: Pid, destinations: &[PathBuf]) -> Result<(), CopyUpError> {
    if destinations.is_empty() {
        return Ok(());
    }
    let root =
        |path: &Path| Root::open(path).map_err(|source| CopyUpError::Open { path: path.into(), source });
    let image = root(rootfs)?;
    let container = Path::new("/proc").join(init.to_string()).join("root");
    // It is a link, which a Root does not follow.
    let opened = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&container);
    let opened = opened.map_err(|source| CopyUpError::Copy { path: container, source })?;
    let container = Root::from_fd(OwnedFd::from(opened));
    for path in destinations {
        let Ok(from) = image.resolve(path) else { continue };
        let failed = |source| CopyUpError::Open { path: path.clone(), source };
        let to = container.resolve(path).map_err(failed)?;
        let (from, to): (OwnedFd, OwnedFd) = (from.into(), to.into());
        let by_descriptor = |fd: &OwnedFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (from, to) = (by_descriptor(&from), by_descriptor(&to));
        let copied = fs::metadata(&to).and_then(|tmpfs| copy_entries(&from, &to, tmpfs.dev()));
        copied.map_err(|source| CopyUpError::Copy { path: path.clone(), source })?;
    }
    Ok(())
}

/// Copies the entries of a directory. A directory in which something else is mounted (`device` differs) stays as it is.
fn copy_entries(from: &Path, to: &Path, device: u64) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        match fs::symlink_metadata(&to) {
            // The place of a mount, which was made for it.
            Ok(there) if !there.is_dir() || !meta.is_dir() || there.dev() != device => continue,
            _ => copy_entry(&from, &to, &meta, device)?,
        }
    }
    Ok(())
}

fn copy_entry(from: &Path, to: &Path, meta: &Metadata, device: u64) -> io::Result<()> {
    let kind = meta.file_type();
    let (uid, gid) = (Some(meta.uid()), Some(meta.gid()));
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        return lchown(to, uid, gid);
    }
    if kind.is_dir() {
        match fs::create_dir(to) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => copy_entries(from, to, device)?,
        }
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else if kind.is_socket() {
        // No process listens on a socket of an image.
        return Ok(());
    } else {
        let kind = SFlag::from_bits_truncate(meta.mode() & SFlag::S_IFMT.bits());
        mknod(to, kind, Mode::from_bits_truncate(meta.mode()), meta.rdev())?;
    }
    chown(to, uid, gid)?;
    // After the change of the owner, which clears the bits for another user and group.
    fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_links_and_directories_keep_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        let (image, tmpfs) = (dir.path().join("image"), dir.path().join("tmpfs"));
        fs::create_dir_all(image.join("d/e")).unwrap();
        fs::create_dir_all(tmpfs.join("d")).unwrap();
        fs::write(image.join("d/e/f"), "content").unwrap();
        fs::set_permissions(image.join("d/e/f"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(image.join("d"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/nowhere", image.join("link")).unwrap();
        fs::write(image.join("mounted"), "of the image").unwrap();
        fs::write(tmpfs.join("mounted"), "of the mount").unwrap();
        let device = fs::metadata(&tmpfs).unwrap().dev();
        copy_entries(&image, &tmpfs, device).unwrap();
        let mode = |path: &str| fs::metadata(tmpfs.join(path)).unwrap().mode() & 0o7777;
        assert_eq!((mode("d/e/f"), mode("d")), (0o4711, 0o1777));
        assert_eq!(fs::read_to_string(tmpfs.join("d/e/f")).unwrap(), "content");
        assert_eq!(fs::read_link(tmpfs.join("link")).unwrap(), Path::new("/nowhere"));
        assert_eq!(fs::read_to_string(tmpfs.join("mounted")).unwrap(), "of the mount");
        // A file system on another device is left alone.
        copy_entries(&image, &dir.path().join("tmpfs"), device + 1).unwrap();
    }
}
