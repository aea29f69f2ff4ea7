//! A read-only mount of a root file system, which is not attached to the file system tree.
//!
//! The mount is made in a mount namespace of one short-lived thread, and a detached copy of it is taken
//! before the thread ends. The copy exists as long as its descriptor, so nothing has to be unmounted, not
//! even after a kill. Source: mount(2), open_tree(2), mount_namespaces(7),
//! Documentation/filesystems/overlayfs.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use machinen_base::{
    fs::FileError,
    mounts::{TreeOptions, clone_tree},
    owner,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{CWD, Mode, OFlags, open},
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::{RootdiskError, tree::lossy};

/// The mount; files are opened below its descriptor.
#[derive(Debug)]
pub(crate) struct SourceMount {
    root: OwnedFd,
    /// The source, for messages.
    name: PathBuf,
}

impl AsFd for SourceMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl SourceMount {
    /// A directory without what is mounted below it.
    pub(super) fn of_dir(dir: &Path) -> Result<Self, RootdiskError> {
        let failed = FileError::at("mount a read-only view of", dir);
        Ok(Self { root: read_only(dir).map_err(failed)?, name: dir.to_owned() })
    }

    /// The merged layers, top first.
    pub(super) fn of_layers(layers: &[&Path]) -> Result<Self, RootdiskError> {
        let name = match layers {
            [] => return Err(RootdiskError::NoLayers),
            // An overlay needs two layers. A single layer has nothing below it that its marks could hide, and
            // the overlay that the guest makes of the disk hides the marks themselves.
            [dir] => return Self::of_dir(dir),
            [top, ..] => *top,
        };
        Self::mounted(name, |target| {
            // The mount's options are limited to a page. Descriptors are short names whatever the paths are,
            // so the kernel's limit of 500 layers fits; the colons and commas that paths may have do not
            // matter either. They are opened here because the layers of an overlay must be in the caller's
            // mount namespace.
            let dirs = layers.iter().map(|dir| {
                open(*dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| FileError::new("open the layer", dir, error))
            });
            let dirs = dirs.collect::<Result<Vec<_>, _>>()?;
            let names: Vec<_> = dirs.iter().map(|dir| dir.as_raw_fd().to_string()).collect();
            // An ordinary user's overlayfs keeps its marks in attributes that the user may set.
            let marks = if owner::user().is_some() { ",userxattr" } else { "" };
            let options = format!("lowerdir={}{marks}", names.join(":"));
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
            nix::unistd::chdir("/proc/self/fd")
                .and_then(|()| {
                    mount(Some("machinen"), target, Some("overlay"), flags, Some(options.as_str()))
                })
                .map_err(|error| FileError::new("mount a read-only view of", name, error).into())
        })
    }

    /// A directory that has only `upper`, which is `dir`: the tree of a writable layer with the files of
    /// `dir`.
    pub(crate) fn of_upper(dir: &Path) -> Result<Self, RootdiskError> {
        Self::mounted(dir, |target| {
            let upper = target.join("upper");
            mount(Some("machinen"), target, Some("tmpfs"), MsFlags::empty(), Some("mode=0755,size=64k"))
                .and_then(|()| nix::unistd::mkdir(&upper, nix::sys::stat::Mode::S_IRWXU))
                .map_err(io::Error::from)
                .and_then(|()| {
                    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                    Ok(move_mount(read_only(dir)?, "", CWD, &upper, flags)?)
                })
                .map_err(|error| FileError::new("mount a read-only view of", dir, error).into())
        })
    }

    /// Calls `make` to mount something at a path, and returns a detached copy of that mount.
    fn mounted(
        name: &Path,
        make: impl FnOnce(&Path) -> Result<(), RootdiskError> + Send,
    ) -> Result<Self, RootdiskError> {
        let detached = || -> Result<OwnedFd, RootdiskError> {
            let prepare = || {
                unshare(CloneFlags::CLONE_NEWNS)?;
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            };
            prepare().map_err(|error| FileError::new("make a mount namespace for a view of", name, error))?;
            // Only this thread sees the new mount, because it has a mount namespace of its own.
            let target = Path::new("/proc");
            make(target)?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            open_tree(CWD, target, flags | OpenTreeFlags::AT_RECURSIVE)
                .map_err(|error| FileError::new("detach a view of", name, error).into())
        };
        let root = thread::scope(|scope| scope.spawn(detached).join()).expect("the thread does not panic")?;
        Ok(Self { root, name: name.to_owned() })
    }

    /// Duplicates the descriptor, for a child process.
    pub(crate) fn share(&self) -> Result<OwnedFd, RootdiskError> {
        self.root.try_clone().map_err(|error| FileError::new("share the view of", &self.name, error).into())
    }

    /// The path of a file in the view, for calls that take no descriptor.
    pub(super) fn path_of(&self, path: &[u8]) -> Vec<u8> {
        let mut full = format!("/proc/self/fd/{}/", self.root.as_raw_fd()).into_bytes();
        full.extend_from_slice(if path.is_empty() { b"." } else { path });
        full
    }

    /// Opens a file or directory of the tree for reading. Not for devices, since opening them has side
    /// effects.
    pub(super) fn open(&self, path: &[u8]) -> Result<OwnedFd, RootdiskError> {
        let path_or_root: &[u8] = if path.is_empty() { b"." } else { path };
        open_in(self, path_or_root).map_err(|error| self.error("open", path, error))
    }

    pub(super) fn error(
        &self,
        action: &'static str,
        path: &[u8],
        source: impl Into<io::Error>,
    ) -> RootdiskError {
        let (path, root) = (lossy(path), self.name.clone());
        RootdiskError::Source { action, path, root, source: source.into() }
    }
}

/// Opens for reading without following a link or waiting for a FIFO's other end.
pub(super) fn open_in(dir: impl AsFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// A read-only mount of a directory, which is in no namespace yet. The flags that its mount has on the host stay: those of
/// a mount from outside of this user namespace must not be taken away.
fn read_only(dir: &Path) -> io::Result<OwnedFd> {
    let opened = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let options = TreeOptions { recursive: false, read_only: true, follows_host: false };
    clone_tree(opened.as_fd(), options)
}
