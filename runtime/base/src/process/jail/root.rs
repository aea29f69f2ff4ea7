//! What a jailed program sees of the host's files.
//!
//! ```text
//!   /                 an empty file system in memory, read-only
//!   /usr/lib ...      the libraries of the host, read-only
//!   /<program>        the program, read-only, at its real path
//!   /proc             the program's own processes
//!   /own              a directory in which the program may write, if its jail has one
//! ```
//! The parent makes all mounts before the fork, without attaching them. Between fork and exec the child attaches them in
//! its own mount namespace, and leaves the host's root (`sys::root`).

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, chmodat, mkdirat, mknodat, symlinkat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string,
        fsmount, fsopen, open_tree,
    },
};

use crate::{
    fs::FileError,
    sys::root::{MountAttributes, RootMounts, set_attributes},
};

/// The files of the host that a jailed program sees in addition to its own file and its libraries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JailFiles {
    /// Files and directories that the program can read, at their real paths. What does not exist is left out.
    pub readable: Vec<PathBuf>,
    /// Device nodes that the program can open, as far as their modes allow, at their real paths.
    pub devices: Vec<PathBuf>,
    /// A directory in which the program starts and can write. Without it the program starts in the root.
    pub working_dir: Option<PathBuf>,
    /// Empty directories, by their paths, on which something is mounted while the program runs.
    pub mount_points: Vec<PathBuf>,
    /// Files that the program can read at other paths than their own, which come second. What does not exist is left out.
    /// The first path may be that of a descriptor of this process, such as one of a namespace.
    pub placed: Vec<(PathBuf, PathBuf)>,
}

/// The place of the working directory in the jail.
const OWN: &str = "/own";
/// Directories of libraries, and the cache by which the dynamic linker finds them (ld.so(8)).
const LIBRARIES: [&str; 3] = ["/usr/lib", "/usr/lib64", "/etc/ld.so.cache"];
/// Libraries and the dynamic linker are also named by these, which are links on most distributions.
const LIBRARY_LINKS: [&str; 2] = ["lib", "lib64"];
/// Directories of programs, next to which their libraries are.
const PROGRAM_DIRS: [&str; 3] = ["bin", "sbin", "libexec"];

const READABLE: MountAttributes = MountAttributes { read_only: true, devices: false, executable: true };
const DEVICE: MountAttributes = MountAttributes { read_only: true, devices: true, executable: false };
const WRITABLE: MountAttributes = MountAttributes { read_only: false, devices: false, executable: false };
const PLACED: MountAttributes = MountAttributes { read_only: true, devices: false, executable: false };
const EMPTY: MountAttributes = MountAttributes { read_only: true, devices: false, executable: false };

/// A root that is being put together.
struct RootBuilder {
    root: OwnedFd,
    mounts: Vec<(OwnedFd, CString)>,
}

impl JailFiles {
    /// Makes the root for `program`, the real path of an executable file.
    pub(crate) fn mounts(&self, program: &Path) -> Result<RootMounts, FileError> {
        let failed = FileError::at("make the root of a jail for", program);
        let mut root = RootBuilder::empty().map_err(failed)?;
        for link in LIBRARY_LINKS {
            root.link_or_mount(link)?;
        }
        let libraries = LIBRARIES.iter().map(PathBuf::from).chain(libraries_next_to(program));
        for path in libraries.chain(self.readable.iter().cloned()) {
            root.mount(&path, READABLE)?;
        }
        for path in &self.devices {
            root.mount(path, DEVICE)?;
        }
        for (path, at) in &self.placed {
            match path.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => root.mount_at(path, at, PLACED)?,
            }
        }
        root.mount(program, READABLE)?;
        if let Some(interpreter) = interpreter(program)? {
            root.mount_at(&interpreter, &interpreter, READABLE)?;
        }
        if let Some(dir) = &self.working_dir {
            root.mount_at(dir, Path::new(OWN), WRITABLE)?;
        }
        for path in &self.mount_points {
            let made = root.directory(path.strip_prefix("/").unwrap_or(path));
            made.map_err(FileError::at("make the mount point", path))?;
        }
        root.finish(self.working_dir.as_ref().map_or("/", |_| OWN))
            .map_err(FileError::at("make the root of a jail for", program))
    }
}

/// The library directories of the prefix that a program is installed in, unless all programs have them.
fn libraries_next_to(program: &Path) -> Vec<PathBuf> {
    let dir = program.parent().filter(|dir| PROGRAM_DIRS.iter().any(|name| dir.ends_with(name)));
    let prefix = dir.and_then(Path::parent).filter(|prefix| *prefix != Path::new("/usr"));
    prefix.map(|prefix| vec![prefix.join("lib"), prefix.join("lib64")]).unwrap_or_default()
}

/// The program that runs a script, by the path in the script's first line (execve(2)).
fn interpreter(program: &Path) -> Result<Option<PathBuf>, FileError> {
    // The kernel reads as many bytes.
    let mut start = Vec::new();
    File::open(program)
        .and_then(|file| file.take(256).read_to_end(&mut start))
        .map_err(FileError::at("read", program))?;
    let line = start.strip_prefix(b"#!").and_then(|rest| rest.split(|byte| *byte == b'\n').next());
    let words = line.unwrap_or_default().split(|byte| byte.is_ascii_whitespace());
    let path = words.filter(|word| !word.is_empty()).map(OsStr::from_bytes).next();
    Ok(path.map(PathBuf::from).filter(|path| path.is_absolute()))
}

impl RootBuilder {
    fn empty() -> io::Result<Self> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in [("source", "machinen"), ("mode", "0755"), ("size", "64k")] {
            fsconfig_set_string(context.as_fd(), key, value)?;
        }
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let root = Self { root, mounts: Vec::new() };
        root.directory(Path::new("proc"))?;
        Ok(root)
    }

    /// Makes the same link as the host has, or shows the host's directory.
    fn link_or_mount(&mut self, name: &str) -> Result<(), FileError> {
        let path = Path::new("/").join(name);
        match fs::read_link(&path) {
            Ok(target) => {
                // Relative to the root, because this process resolves it in its own root until the child enters.
                let target = target.strip_prefix("/").unwrap_or(&target);
                symlinkat(target, &self.root, name).map_err(|error| FileError::new("link", path, error))
            }
            Err(_) => self.mount(&path, READABLE),
        }
    }

    /// Shows a file or directory at its real path, if it exists.
    fn mount(&mut self, path: &Path, attributes: MountAttributes) -> Result<(), FileError> {
        match path.canonicalize() {
            Ok(real) => self.mount_at(&real, &real, attributes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(FileError::new("show a jailed program", path, error)),
        }
    }

    fn mount_at(&mut self, path: &Path, at: &Path, attributes: MountAttributes) -> Result<(), FileError> {
        let mounted = || -> io::Result<(OwnedFd, CString)> {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let mount = open_tree(CWD, path, flags)?;
            set_attributes(mount.as_fd(), attributes)?;
            let at = at.strip_prefix("/").unwrap_or(at);
            if path.is_dir() {
                self.directory(at)?;
            } else {
                self.file(at)?;
            }
            Ok((mount, CString::new(at.as_os_str().as_bytes())?))
        };
        let mount = mounted().map_err(FileError::at("show a jailed program", path))?;
        self.mounts.push(mount);
        Ok(())
    }

    /// Makes a directory and its parents; `path` has no leading slash.
    fn directory(&self, path: &Path) -> io::Result<()> {
        let mut parents: Vec<_> = path.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
        parents.reverse();
        for dir in parents {
            match mkdirat(&self.root, dir, Mode::from_raw_mode(0o755)) {
                // The mode that mkdir(2) sets depends on the umask.
                Ok(()) => chmodat(&self.root, dir, Mode::from_raw_mode(0o755), AtFlags::empty())?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn file(&self, path: &Path) -> io::Result<()> {
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        // Made without a descriptor: a child that another thread forks at this moment would keep it open for writing, and
        // the root could not become read-only (EBUSY).
        match mknodat(&self.root, path, FileType::RegularFile, Mode::from_raw_mode(0o444), 0) {
            Err(Errno::EXIST) => {}
            made => made?,
        }
        Ok(())
    }

    fn finish(self, working_dir: &str) -> io::Result<RootMounts> {
        set_attributes(self.root.as_fd(), EMPTY)?;
        let working_dir = CString::new(working_dir)?;
        Ok(RootMounts { root: self.root, mounts: self.mounts, working_dir })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_of_a_script_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        for (text, expected) in [
            ("#! /bin/sh -e\nexit\n", Some("/bin/sh")),
            ("#!/bin/sh", Some("/bin/sh")),
            ("#!sh\n", None),
            ("\x7fELF", None),
            ("", None),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(interpreter(&path).unwrap(), expected.map(PathBuf::from), "{text}");
        }
    }

    #[test]
    fn libraries_are_next_to_the_directory_of_programs() {
        let next_to = |path| libraries_next_to(Path::new(path));
        assert_eq!(next_to("/opt/q/bin/qemu"), [PathBuf::from("/opt/q/lib"), PathBuf::from("/opt/q/lib64")]);
        assert!(next_to("/usr/bin/qemu").is_empty() && next_to("/tmp/qemu").is_empty());
    }
}
