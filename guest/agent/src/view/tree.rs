//! The files below a container's root, by the numbers that the host's kernel has for them.
//!
//! No path leads out of the root: a file is found from the root's descriptor, name by name, across mounts but
//! never through a symbolic link (openat2(2), RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS). The host's kernel
//! follows links itself. An open descriptor's file is then reached through /proc/self/fd, whatever has
//! happened to its name.

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
use machinen_protocol::fuse::ROOT;
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, open, openat, openat2, statx,
    },
    io::Errno,
};

use super::{
    attributes::{self, AttributeChange},
    nodes::{FileIdentity, Nodes},
};

/// Longest path that is resolved by one call, bytes; the kernel's limit is PATH_MAX.
const STRIDE: usize = 3072;
const NAME_MAX: usize = 255;

#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    nodes: Nodes,
    handles: HashMap<u64, OpenFile>,
    next_handle: u64,
}

/// A file or directory that is open on the host.
#[derive(Debug)]
struct OpenFile {
    node: u64,
    file: File,
}

/// The file of a node, open with O_PATH, and its status.
#[derive(Debug)]
pub(super) struct LocatedFile {
    fd: OwnedFd,
    status: Statx,
}

impl LocatedFile {
    fn at(fd: OwnedFd) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let status = statx(&fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        Ok(Self { fd, status })
    }

    fn identity(&self) -> FileIdentity {
        let Statx { stx_mnt_id: mount, stx_ino: inode, .. } = self.status;
        FileIdentity { mount, device: (self.status.stx_dev_major, self.status.stx_dev_minor), inode }
    }

    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.status.stx_mode.into())
    }

    /// A path to the file itself, which may be a symbolic link.
    pub(super) fn path(&self) -> PathBuf {
        path_of(self.fd.as_fd())
    }

    /// Opens the file. Devices and pipes are refused: the host's kernel opens its own.
    pub(super) fn open(&self, flags: OFlags) -> io::Result<File> {
        if !matches!(self.kind(), FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO.into());
        }
        // A read of a file in /proc may block, and would delay all other requests.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        Ok(open(self.path(), flags, Mode::empty())?.into())
    }
}

impl AsFd for LocatedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

impl Tree {
    /// Serves the files below `root`. New numbers start at `first`.
    pub(super) fn new(root: OwnedFd, first: u64) -> Self {
        Self { root, nodes: Nodes::new(ROOT, first), handles: HashMap::new(), next_handle: first }
    }

    /// Finds the present file of a node.
    ///
    /// # Errors
    /// ESTALE when the file is not where it was last seen: the host's kernel then looks its name up again.
    pub(super) fn locate(&mut self, node: u64) -> io::Result<LocatedFile> {
        let located = match self.walk(node) {
            Ok(fd) => Some(LocatedFile::at(fd)?).filter(|located| self.is_still(node, located)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => None,
            Err(errno) => return Err(errno.into()),
        };
        let located = match located {
            Some(located) => located,
            None => {
                // The host may have the file open, under another name or without one.
                let open = self.handles.values().find(|handle| handle.node == node).ok_or(Errno::STALE)?;
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                LocatedFile::at(openat(CWD, path_of(open.file.as_fd()), flags, Mode::empty())?)?
            }
        };
        self.nodes.set_identity(node, located.identity());
        Ok(located)
    }

    /// Whether the file at a node's place is the node's file. Any directory is: an overlay replaces a
    /// directory by a copy when something in it changes, and the host may be working in it.
    fn is_still(&self, node: u64, located: &LocatedFile) -> bool {
        let known = self.nodes.identity(node);
        located.kind() == FileType::Directory || known.is_none_or(|known| known == located.identity())
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
        let located = self.locate(node)?;
        Ok(Self::describe(node, &located))
    }

    /// Changes a file, which may make an overlay copy it, and returns the new attributes.
    pub(super) fn change(&mut self, node: u64, change: AttributeChange) -> io::Result<FileAttr> {
        let located = self.locate(node)?;
        change.apply(&located)?;
        let located = LocatedFile::at(located.fd)?;
        self.nodes.set_identity(node, located.identity());
        Ok(Self::describe(node, &located))
    }

    fn describe(node: u64, located: &LocatedFile) -> FileAttr {
        attributes::of(INodeNo(node), &located.status)
    }

    /// Finds the directory of a name, and checks the name.
    pub(super) fn parent(&mut self, node: u64, name: &OsStr) -> io::Result<LocatedFile> {
        let bytes = name.as_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        if bytes.is_empty() || bytes.contains(&b'/') || bytes == b"." || bytes == b".." {
            return Err(Errno::INVAL.into());
        }
        self.locate(node)
    }

    /// Looks up a name; from then on the host's kernel knows its node.
    pub(super) fn entry(&mut self, parent: u64, name: &OsStr) -> io::Result<FileAttr> {
        let dir = self.parent(parent, name)?;
        self.entry_in(parent, &dir, name)
    }

    pub(super) fn entry_in(&mut self, parent: u64, dir: &LocatedFile, name: &OsStr) -> io::Result<FileAttr> {
        let located = Self::child(dir, name)?;
        let node = self.nodes.found(parent, name, located.identity());
        Ok(Self::describe(node, &located))
    }

    fn child(dir: &LocatedFile, name: &OsStr) -> io::Result<LocatedFile> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        LocatedFile::at(openat(dir, name, flags, Mode::empty())?)
    }

    /// Records that a file was moved to this name.
    pub(super) fn moved(&mut self, parent: u64, dir: &LocatedFile, name: &OsStr) {
        // If the file was removed or replaced in the meantime, the next lookup notices.
        if let Ok(located) = Self::child(dir, name) {
            self.nodes.moved(located.identity(), parent, name);
        }
    }

    pub(super) fn forget(&mut self, node: u64, lookups: u64) {
        self.nodes.forget(node, lookups);
    }

    pub(super) fn keep(&mut self, node: u64, file: File) -> u64 {
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, OpenFile { node, file });
        number
    }

    /// Looks up an open file.
    ///
    /// # Errors
    /// EBADF when no file is open under that number.
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
    fn no_path_leads_out_of_the_root() {
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
            assert_eq!(errno(tree.locate(link.ino.0).unwrap().open(OFlags::RDONLY)), Errno::NXIO, "{name}");
        }
        // A directory that was replaced by a link since its lookup.
        let dir = tree.entry(ROOT, "dir".as_ref()).unwrap();
        fs::write(root.join("dir/file"), "inside").unwrap();
        let file = tree.entry(dir.ino.0, "file".as_ref()).unwrap();
        fs::rename(root.join("dir"), outside.path().join("dir")).unwrap();
        symlink(outside.path().join("dir"), root.join("dir")).unwrap();
        assert_eq!(errno(tree.locate(file.ino.0)), Errno::STALE);
        assert_eq!(errno(tree.entry(dir.ino.0, "file".as_ref())), Errno::STALE);
    }

    #[test]
    fn a_replaced_file_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        fs::write(&path, "one").unwrap();
        let mut tree = tree(root.path());
        let one = tree.entry(ROOT, "file".as_ref()).unwrap().ino.0;
        let file = tree.locate(one).unwrap().open(OFlags::RDONLY).unwrap();
        // The inode number is not reused while the file is open.
        let handle = tree.keep(one, file);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        assert_eq!(tree.attributes(one).unwrap().size, 3, "an open file is still reachable");
        let other = tree.entry(ROOT, "file".as_ref()).unwrap();
        assert!(other.ino.0 != one && other.size == 5, "{other:?}");
        tree.close(handle);
        assert_eq!(errno(tree.attributes(one)), Errno::STALE);
        assert_eq!(errno(tree.open_file(handle).map(drop)), Errno::BADF);
    }

    #[test]
    fn paths_may_be_longer_than_one_call_resolves() {
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
