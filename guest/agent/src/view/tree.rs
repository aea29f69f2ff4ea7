//! The files below a container's root, by the numbers that the host's kernel has for them.
//!
//! Nothing leads out: a place is walked to from the root's descriptor, name by name, across mounts but never by a symbolic
//! link (openat2(2), RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS). Links are followed by whoever looks, on the host. What a
//! descriptor stands for is then reached through /proc/self/fd, whatever has happened to its name.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use fuser::{FileAttr, INodeNo};
use machinen_protocol::view::ROOT;
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, open, openat, openat2, statx,
    },
    io::Errno,
};

use super::{
    attributes::{self, Change},
    nodes::{Identity, Nodes},
};

/// A walk takes paths of this length at once; the kernel's limit is PATH_MAX.
const STRIDE: usize = 3072;
const NAME_MAX: usize = 255;

#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
}

/// A file or directory that somebody on the host has open.
#[derive(Debug)]
struct Handle {
    node: u64,
    file: File,
}

/// A file that a node stands for (O_PATH).
#[derive(Debug)]
pub(super) struct Here {
    fd: OwnedFd,
    status: Statx,
}

impl Here {
    fn at(fd: OwnedFd) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let status = statx(&fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        Ok(Self { fd, status })
    }

    fn identity(&self) -> Identity {
        let Statx { stx_mnt_id: mount, stx_ino: inode, .. } = self.status;
        Identity { mount, device: (self.status.stx_dev_major, self.status.stx_dev_minor), inode }
    }

    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.status.stx_mode.into())
    }

    /// A path to the file itself, be it a symbolic link.
    pub(super) fn path(&self) -> PathBuf {
        path_of(self.fd.as_fd())
    }

    /// Opens it. A device or pipe is opened on the host or not at all.
    pub(super) fn open(&self, flags: OFlags) -> io::Result<File> {
        if !matches!(self.kind(), FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO.into());
        }
        // Files of /proc may wait for something to tell; nobody else is served meanwhile.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(open(self.path(), flags, Mode::empty())?.into())
    }
}

impl AsFd for Here {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

impl Tree {
    /// `root` is the directory that nothing leads out of. Numbers are given from `first` on.
    pub(super) fn new(root: OwnedFd, first: u64) -> Self {
        Self { root, nodes: Nodes::new(ROOT, first), handles: HashMap::new(), next_handle: first }
    }

    /// What a node stands for now.
    ///
    /// # Errors
    /// ESTALE when it is not where it was: the host's kernel looks its name up again then.
    pub(super) fn here(&mut self, node: u64) -> io::Result<Here> {
        let here = match self.walk(node) {
            Ok(fd) => Some(Here::at(fd)?).filter(|here| self.is_still(node, here)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => None,
            Err(errno) => return Err(errno.into()),
        };
        let here = match here {
            Some(here) => here,
            None => {
                // Somebody may have it open, by another name or without one.
                let open = self.handles.values().find(|handle| handle.node == node).ok_or(Errno::STALE)?;
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                Here::at(openat(CWD, path_of(open.file.as_fd()), flags, Mode::empty())?)?
            }
        };
        self.nodes.became(node, here.identity());
        Ok(here)
    }

    /// Whether what is at a node's place is what the node stands for. A directory is, whichever it is: an overlay makes another
    /// of it when something in it changes, and the host may be working in it.
    fn is_still(&self, node: u64, here: &Here) -> bool {
        let known = self.nodes.identity(node);
        here.kind() == FileType::Directory || known.is_none_or(|known| known == here.identity())
    }

    fn walk(&self, node: u64) -> Result<OwnedFd, Errno> {
        let names = self.nodes.path(node).ok_or(Errno::STALE)?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let step = |from: BorrowedFd<'_>, path: &OsStr| openat2(from, path, flags, Mode::empty(), beneath);
        let mut at = None;
        let mut path = OsString::from(".");
        for name in names {
            if path.len() > STRIDE {
                at = Some(step(at.as_ref().unwrap_or(&self.root).as_fd(), &path)?);
                path = ".".into();
            }
            path.push("/");
            path.push(name);
        }
        step(at.as_ref().unwrap_or(&self.root).as_fd(), &path)
    }

    pub(super) fn attributes(&mut self, node: u64) -> io::Result<FileAttr> {
        let here = self.here(node)?;
        Ok(Self::describe(node, &here))
    }

    /// Changes a file, which an overlay may copy for it, and says what it is like then.
    pub(super) fn change(&mut self, node: u64, change: Change) -> io::Result<FileAttr> {
        let here = self.here(node)?;
        change.make(&here)?;
        let here = Here::at(here.fd)?;
        self.nodes.became(node, here.identity());
        Ok(Self::describe(node, &here))
    }

    fn describe(node: u64, here: &Here) -> FileAttr {
        attributes::of(INodeNo(node), &here.status)
    }

    /// The directory that a name is in, when the name is one.
    pub(super) fn parent(&mut self, node: u64, name: &OsStr) -> io::Result<Here> {
        let bytes = name.as_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        if bytes.is_empty() || bytes.contains(&b'/') || bytes == b"." || bytes == b".." {
            return Err(Errno::INVAL.into());
        }
        self.here(node)
    }

    /// Looks a name up; the host's kernel knows of its node from then on.
    pub(super) fn entry(&mut self, parent: u64, name: &OsStr) -> io::Result<FileAttr> {
        let dir = self.parent(parent, name)?;
        self.entry_in(parent, &dir, name)
    }

    pub(super) fn entry_in(&mut self, parent: u64, dir: &Here, name: &OsStr) -> io::Result<FileAttr> {
        let here = Self::child(dir, name)?;
        let node = self.nodes.found(parent, name, here.identity());
        Ok(Self::describe(node, &here))
    }

    fn child(dir: &Here, name: &OsStr) -> io::Result<Here> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Here::at(openat(dir, name, flags, Mode::empty())?)
    }

    /// A file has been moved to this name.
    pub(super) fn moved(&mut self, parent: u64, dir: &Here, name: &OsStr) {
        // What has been removed or replaced meanwhile is found out at the next lookup.
        if let Ok(here) = Self::child(dir, name) {
            self.nodes.moved(here.identity(), parent, name);
        }
    }

    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        self.nodes.forget(node, lookups);
    }

    pub(super) fn keep(&mut self, node: u64, file: File) -> u64 {
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, Handle { node, file });
        number
    }

    /// # Errors
    /// EBADF: nothing is open under that number.
    pub(super) fn open_file(&self, handle: u64) -> io::Result<&File> {
        Ok(self.handles.get(&handle).map(|handle| &handle.file).ok_or(Errno::BADF)?)
    }

    pub(super) fn close(&mut self, handle: u64) {
        self.handles.remove(&handle);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use super::*;

    fn tree(dir: &Path) -> Tree {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Tree::new(open(dir, flags, Mode::empty()).unwrap(), 100)
    }

    fn errno<T>(result: io::Result<T>) -> Errno {
        Errno::from_raw_os_error(result.err().expect("refused").raw_os_error().unwrap())
    }

    #[test]
    fn nothing_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let root = outside.path().join("root");
        fs::create_dir_all(root.join("dir")).unwrap();
        symlink(outside.path(), root.join("absolute")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let mut tree = tree(&root);
        for name in ["", ".", "..", "a/b", "/", "../secret"] {
            assert_eq!(errno(tree.entry(ROOT, name.as_ref())), Errno::INVAL, "{name:?}");
        }
        assert_eq!(errno(tree.entry(ROOT, "x".repeat(256).as_ref())), Errno::NAMETOOLONG);
        for name in ["absolute", "up"] {
            let link = tree.entry(ROOT, name.as_ref()).unwrap();
            assert_eq!(link.kind, fuser::FileType::Symlink);
            assert_eq!(errno(tree.entry(link.ino.0, "secret".as_ref())), Errno::NOTDIR, "{name}");
            assert_eq!(errno(tree.here(link.ino.0).unwrap().open(OFlags::RDONLY)), Errno::NXIO, "{name}");
        }
        // A directory that has become a link since the kernel was told of it.
        let dir = tree.entry(ROOT, "dir".as_ref()).unwrap();
        fs::write(root.join("dir/file"), "inside").unwrap();
        let file = tree.entry(dir.ino.0, "file".as_ref()).unwrap();
        fs::rename(root.join("dir"), outside.path().join("dir")).unwrap();
        symlink(outside.path().join("dir"), root.join("dir")).unwrap();
        assert_eq!(errno(tree.here(file.ino.0)), Errno::STALE);
        assert_eq!(errno(tree.entry(dir.ino.0, "file".as_ref())), Errno::STALE);
    }

    #[test]
    fn a_name_that_stands_for_another_file_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        fs::write(&path, "one").unwrap();
        let mut tree = tree(root.path());
        let one = tree.entry(ROOT, "file".as_ref()).unwrap().ino.0;
        let file = tree.here(one).unwrap().open(OFlags::RDONLY).unwrap();
        // The inode is not free for another file while it is open.
        let handle = tree.keep(one, file);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        assert_eq!(tree.attributes(one).unwrap().size, 3, "who has it open sees it");
        let other = tree.entry(ROOT, "file".as_ref()).unwrap();
        assert!(other.ino.0 != one && other.size == 5, "{other:?}");
        tree.close(handle);
        assert_eq!(errno(tree.attributes(one)), Errno::STALE);
        assert_eq!(errno(tree.open_file(handle).map(drop)), Errno::BADF);
    }

    #[test]
    fn paths_may_be_longer_than_the_kernel_takes_at_once() {
        let root = tempfile::tempdir().unwrap();
        let name = "n".repeat(200);
        let mut tree = tree(root.path());
        let mut at = ROOT;
        for _ in 0..40 {
            let dir = tree.parent(at, name.as_ref()).unwrap();
            rustix::fs::mkdirat(&dir, name.as_str(), Mode::RWXU).unwrap();
            at = tree.entry_in(at, &dir, name.as_ref()).unwrap().ino.0;
        }
        assert_eq!(tree.attributes(at).unwrap().kind, fuser::FileType::Directory);
    }
}
