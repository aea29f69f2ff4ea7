//! Where a path in a container leads, without the kernel of the host following a link of the container.
//!
//! Each component is opened by itself. A link is read, and its target is looked up from the container's root or from the
//! directory that the link is in, as the container would do it. `..` at the root stays there.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, openat, readlinkat, statat},
    io::Errno,
};

use super::CopyError;

/// Most links on one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// A name in a directory. The name need not exist.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) parent: OwnedFd,
    /// `.` for the directory itself.
    pub(crate) name: OsString,
    /// As the user has named it.
    pub(crate) shown: PathBuf,
}

/// What happens to a link at the end of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LastLink {
    /// The path means the link.
    Keep,
    /// The path means what the link leads to.
    Follow,
}

impl Place {
    /// The type of what is there; None: nothing is. A link is not followed.
    ///
    /// # Errors
    /// The directory cannot be searched.
    pub(crate) fn kind(&self) -> Result<Option<FileType>, CopyError> {
        match statat(&self.parent, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(CopyError::at("look up", &self.shown, errno)),
        }
    }
}

/// Looks up a path below `root`. All but its last component must be directories that exist.
///
/// # Errors
/// A component is missing or no directory, or there are too many links.
pub(crate) fn resolve(root: &OwnedFd, path: &Path, last: LastLink) -> Result<Place, CopyError> {
    let failed = |errno| CopyError::at("look up", path, errno);
    let mut ahead = components(path.as_os_str());
    let mut dirs = vec![root.try_clone().map_err(|error| CopyError::File {
        action: "look up",
        path: path.to_owned(),
        source: error,
    })?];
    let mut links = 0;
    loop {
        let top = dirs.last().expect("the root is never left").as_fd();
        let Some(name) = ahead.pop_front() else {
            let parent = dirs.pop().expect("the root is never left");
            return Ok(Place { parent, name: ".".into(), shown: path.to_owned() });
        };
        if name == ".." {
            if dirs.len() > 1 {
                dirs.pop();
            }
            continue;
        }
        let is_last = ahead.is_empty();
        let kind = match statat(top, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            Err(Errno::NOENT) if is_last => FileType::Unknown,
            Err(errno) => return Err(failed(errno)),
        };
        match kind {
            FileType::Symlink if !is_last || last == LastLink::Follow => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(CopyError::TooManyLinks { path: path.to_owned(), max: MAX_LINKS });
                }
                let target =
                    OsString::from_vec(readlinkat(top, &name, Vec::new()).map_err(failed)?.into_bytes());
                if target.as_bytes().starts_with(b"/") {
                    dirs.truncate(1);
                }
                let mut further = components(&target);
                further.append(&mut ahead);
                ahead = further;
            }
            FileType::Directory if !is_last => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let dir = openat(top, &name, flags, Mode::empty()).map_err(failed)?;
                dirs.push(dir);
            }
            _ if is_last => {
                let parent = dirs.pop().expect("the root is never left");
                return Ok(Place { parent, name, shown: path.to_owned() });
            }
            _ => return Err(CopyError::NotADirectory { path: path.to_owned() }),
        }
    }
}

/// The components of a path without empty ones and `.`. One `.` at the end stays: it makes the one before it a directory.
fn components(path: &OsStr) -> VecDeque<OsString> {
    let parts = path.as_bytes().split(|byte| *byte == b'/').filter(|part| !part.is_empty());
    let mut parts: VecDeque<OsString> = parts.map(|part| OsStr::from_bytes(part).to_owned()).collect();
    let is_content = parts.back().is_some_and(|last| last == ".");
    parts.retain(|part| part != ".");
    if is_content && !parts.is_empty() {
        parts.push_back(".".into());
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root(dir: &Path) -> OwnedFd {
        rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    fn read(place: &Place) -> Option<Vec<u8>> {
        let file =
            openat(&place.parent, &place.name, OFlags::RDONLY | OFlags::NOFOLLOW, Mode::empty()).ok()?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut fs::File::from(file), &mut bytes).ok()?;
        Some(bytes)
    }

    #[test]
    fn links_lead_to_files_of_the_container() {
        let host = tempfile::tempdir().unwrap();
        fs::write(host.path().join("secret"), "host").unwrap();
        let dir = host.path().join("root");
        fs::create_dir_all(dir.join("run/x")).unwrap();
        fs::write(dir.join("secret"), "guest").unwrap();
        fs::write(dir.join("run/x/f"), "f").unwrap();
        symlink("/run", dir.join("var")).unwrap();
        symlink("../../../secret", dir.join("run/up")).unwrap();
        symlink("/secret", dir.join("absolute")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        let root = root(&dir);
        let read = |path: &str| read(&resolve(&root, path.as_ref(), LastLink::Follow).unwrap());
        for path in ["/run/up", "absolute", "/../../secret", "var/../secret", "//./secret"] {
            assert_eq!(read(path).unwrap(), b"guest", "{path}");
        }
        assert_eq!(read("/var/x/f").unwrap(), b"f");
        let kept = resolve(&root, "/absolute".as_ref(), LastLink::Keep).unwrap();
        assert_eq!(kept.kind().unwrap(), Some(FileType::Symlink));
        let error = |path: &str| resolve(&root, path.as_ref(), LastLink::Follow).unwrap_err();
        assert!(matches!(error("/loop"), CopyError::TooManyLinks { .. }));
        assert!(matches!(error("/secret/x"), CopyError::NotADirectory { .. }));
        assert!(matches!(error("/no/x"), CopyError::File { .. }));
        assert_eq!(resolve(&root, "/new".as_ref(), LastLink::Follow).unwrap().kind().unwrap(), None);
    }

    #[test]
    fn a_dot_at_the_end_is_the_directory_itself() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        let root = root(dir.path());
        for path in ["/", "", "/d/.", "/d/.."] {
            let place = resolve(&root, path.as_ref(), LastLink::Keep).unwrap();
            assert_eq!(
                (place.name.to_str(), place.kind().unwrap()),
                (Some("."), Some(FileType::Directory)),
                "{path}"
            );
        }
    }
}
