//! Single files and directories of a container, reached as [`super::resolve()`] does.

use std::{
    fs::File,
    io::Read as _,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, fstat, mkdirat, openat, stat},
    io::Errno,
};

use super::{CopyError, LastLink, resolve};

/// Most bytes of a small file.
const MAX_SMALL: u64 = 1 << 20;

/// Opens the root directory of the process that stands for a container.
///
/// # Errors
/// The process has ended, or has the root of this process: it is not in the container's namespaces (yet).
pub(crate) fn open_root(pid: u32) -> Result<OwnedFd, CopyError> {
    let path = PathBuf::from(format!("/proc/{pid}/root"));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let failed = |errno| CopyError::at("open", &path, errno);
    let root = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed)?;
    let (theirs, own) = (fstat(&root).map_err(failed)?, stat("/").map_err(failed)?);
    match (theirs.st_dev, theirs.st_ino) == (own.st_dev, own.st_ino) {
        true => Err(CopyError::NotServed { pid }),
        false => Ok(root),
    }
}

/// Reads a small file of a container. Returns None if the file does not exist.
///
/// # Errors
/// It cannot be read, is no regular file, or is not small.
pub(crate) fn read_small(root: &OwnedFd, path: &Path) -> Result<Option<Vec<u8>>, CopyError> {
    let failed = |errno| CopyError::at("read", path, errno);
    let place = match resolve(root, path, LastLink::Follow) {
        Err(CopyError::File { source, .. }) if source.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
            return Ok(None);
        }
        place => place?,
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat(&place.parent, &place.name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => file.map_err(failed)?,
    };
    let kind = FileType::from_raw_mode(fstat(&file).map_err(failed)?.st_mode);
    let mut bytes = Vec::new();
    let read = File::from(file).take(MAX_SMALL + 1).read_to_end(&mut bytes);
    read.map_err(|source| CopyError::File { action: "read", path: path.to_owned(), source })?;
    match kind == FileType::RegularFile && bytes.len() as u64 <= MAX_SMALL {
        true => Ok(Some(bytes)),
        false => Err(failed(Errno::FBIG)),
    }
}

/// Makes a directory of a container with those that it is in, where they are missing.
///
/// # Errors
/// Something else is in the way, or the container refuses.
pub(crate) fn make_dirs(root: &OwnedFd, path: &Path) -> Result<(), CopyError> {
    let mut so_far = PathBuf::from("/");
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        so_far.push(name);
        let place = resolve(root, &so_far, LastLink::Follow)?;
        match place.kind()? {
            Some(FileType::Directory) => {}
            Some(_) => return Err(CopyError::NotADirectory { path: so_far }),
            None => {
                let mode = Mode::from_raw_mode(0o755);
                mkdirat(&place.parent, &place.name, mode)
                    .map_err(|errno| CopyError::at("make the directory", &so_far, errno))?;
                // Not by the mode of mkdirat, to which the umask applies.
                rustix::fs::chmodat(&place.parent, &place.name, mode, AtFlags::empty())
                    .map_err(|errno| CopyError::at("set the mode of", &so_far, errno))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn the_root_of_the_host_is_no_containers() {
        assert!(matches!(open_root(std::process::id()), Err(CopyError::NotServed { .. })));
        assert!(matches!(open_root(u32::MAX), Err(CopyError::File { .. })));
    }

    #[test]
    fn files_are_reached_by_the_containers_own_links() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("usr/lib")).unwrap();
        symlink("/usr/lib", dir.path().join("lib")).unwrap();
        fs::write(dir.path().join("usr/lib/f"), "x").unwrap();
        symlink("/etc/passwd", dir.path().join("out")).unwrap();
        let root: OwnedFd = File::open(dir.path()).unwrap().into();
        assert_eq!(read_small(&root, Path::new("/lib/f")).unwrap().unwrap(), b"x");
        assert_eq!(read_small(&root, Path::new("/lib/none")).unwrap(), None);
        assert_eq!(read_small(&root, Path::new("/none/none")).unwrap(), None);
        // It leads to a file of the container, which does not exist.
        assert_eq!(read_small(&root, Path::new("/out")).unwrap(), None);
        assert!(read_small(&root, Path::new("/usr")).is_err());
        make_dirs(&root, Path::new("/lib/a/b")).unwrap();
        assert!(dir.path().join("usr/lib/a/b").is_dir());
        let error = make_dirs(&root, Path::new("/lib/f/b")).unwrap_err();
        assert!(matches!(error, CopyError::NotADirectory { .. }), "{error}");
    }
}
