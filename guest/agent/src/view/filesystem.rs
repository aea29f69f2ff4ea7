//! Carries out FUSE requests by calls to the guest's kernel, below a container's root.

use std::{
    ffi::OsStr,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use rustix::{
    fs::{
        AtFlags, CWD, Dev, FallocateFlags, FileType, Mode, OFlags, RawDir, SeekFrom, XattrFlags, fallocate,
        fdatasync, fstatvfs, fsync, getxattr, linkat, listxattr, makedev, mkdirat, mknodat, openat,
        readlinkat, removexattr, renameat_with, seek, setxattr, symlinkat, unlinkat,
    },
    io::Errno as Errnum,
};

use super::{
    attributes::{self, AttributeChange},
    tree::{LocatedFile, Tree},
};

/// The host's kernel looks up a name each time it uses it.
const NAMES_VALID: Duration = Duration::ZERO;
/// The attributes that a lookup returns remain valid for the call that has caused the lookup.
const ATTRIBUTES_VALID: Duration = Duration::from_millis(10);
const GENERATION: Generation = Generation(0);
/// Most bytes of an extended attribute, and of the list of their names (xattr(7)).
const XATTR_MAX: usize = 64 << 10;
/// Bytes that one read of a directory takes.
const DIRECTORY: usize = 32 << 10;

#[derive(Debug)]
pub(super) struct FileSystem(Mutex<Tree>);

impl FileSystem {
    pub(super) fn new(tree: Tree) -> Self {
        Self(Mutex::new(tree))
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates something under a name, and looks it up.
    fn make(
        &self,
        parent: INodeNo,
        name: &OsStr,
        make: impl FnOnce(&LocatedFile) -> rustix::io::Result<()>,
    ) -> io::Result<FileAttr> {
        let mut tree = self.tree();
        let dir = tree.parent(parent.0, name)?;
        make(&dir)?;
        tree.entry_in(parent.0, &dir, name)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, flags: AtFlags) -> io::Result<()> {
        let dir = self.tree().parent(parent.0, name)?;
        Ok(unlinkat(dir, name, flags)?)
    }

    fn open_as(&self, node: INodeNo, flags: OFlags) -> io::Result<FileHandle> {
        let mut tree = self.tree();
        let file = tree.locate(node.0)?.open(flags)?;
        Ok(FileHandle(tree.keep(node.0, file)))
    }

    fn sync(&self, handle: FileHandle, data_only: bool) -> io::Result<()> {
        let tree = self.tree();
        let file = tree.open_file(handle.0)?;
        Ok(if data_only { fdatasync(file) } else { fsync(file) }?)
    }

    fn create_new(
        &self,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> io::Result<(FileAttr, FileHandle)> {
        let mut tree = self.tree();
        let dir = tree.parent(parent.0, name)?;
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat(&dir, name, shared_flags(flags) | new, permissions(mode));
        let attributes = tree.entry_in(parent.0, &dir, name)?;
        let file = match made {
            Ok(file) => file.into(),
            // The container has created the file first, which matters only to an exclusive creation.
            Err(Errnum::EXIST) if flags & libc::O_EXCL == 0 => {
                tree.locate(attributes.ino.0)?.open(shared_flags(flags))?
            }
            Err(errno) => return Err(errno.into()),
        };
        let handle = tree.keep(attributes.ino.0, file);
        Ok((attributes, FileHandle(handle)))
    }

    fn list(&self, handle: FileHandle, offset: u64, reply: &mut ReplyDirectory) -> io::Result<()> {
        let tree = self.tree();
        let dir = tree.open_file(handle.0)?;
        seek(dir, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); DIRECTORY];
        let mut entries = RawDir::new(dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            let kind = attributes::kind(entry.file_type());
            // 0 means that there is no entry.
            if reply.add(INodeNo(entry.ino().max(1)), entry.next_entry_cookie(), kind, name) {
                break;
            }
        }
        Ok(())
    }
}

/// The flags of an open(2) that have a meaning for a file that another kernel has open.
fn shared_flags(flags: i32) -> OFlags {
    let meant = libc::O_ACCMODE | libc::O_APPEND | libc::O_DSYNC | libc::O_SYNC;
    OFlags::from_bits_truncate((flags & meant).cast_unsigned())
}

fn permissions(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o7777)
}

/// Replies with a result or with an error.
macro_rules! answer {
    ($reply:ident, $result:expr, $ok:pat => $done:expr) => {
        match $result {
            Ok($ok) => $done,
            Err(error) => $reply.error(errno(error)),
        }
    };
}

fn errno(error: io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Filesystem for FileSystem {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply, self.tree().entry(parent.0, name));
    }

    fn forget(&self, _: &Request, node: INodeNo, lookups: u64) {
        self.tree().forget(node.0, lookups);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.tree().attributes(node.0), found => reply.attr(&ATTRIBUTES_VALID, &found));
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        owner: Option<u32>,
        group: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = AttributeChange { mode, owner, group, size, accessed, modified };
        answer!(reply, self.tree().change(node.0, change), now => reply.attr(&ATTRIBUTES_VALID, &now));
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        let target = self.tree().locate(node.0).and_then(|file| Ok(readlinkat(file, "", Vec::new())?));
        answer!(reply, target, target => reply.data(target.as_bytes()));
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let (major, minor) = attributes::device_numbers(device);
        let (kind, device): (_, Dev) = (FileType::from_raw_mode(mode), makedev(major, minor));
        let made = self.make(parent, name, |dir| mknodat(dir, name, kind, permissions(mode), device));
        entry(reply, made);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        entry(reply, self.make(parent, name, |dir| mkdirat(dir, name, permissions(mode))));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer!(reply, self.remove(parent, name, AtFlags::empty()), () => reply.ok());
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer!(reply, self.remove(parent, name, AtFlags::REMOVEDIR), () => reply.ok());
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        entry(reply, self.make(parent, name, |dir| symlinkat(target, dir, name)));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut tree = self.tree();
        let mut rename = || -> io::Result<()> {
            let (from, to) = (tree.parent(parent.0, name)?, tree.parent(new_parent.0, new_name)?);
            let how = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
            renameat_with(&from, name, &to, new_name, how)?;
            tree.moved(new_parent.0, &to, new_name);
            if flags.contains(RenameFlags::RENAME_EXCHANGE) {
                tree.moved(parent.0, &from, name);
            }
            Ok(())
        };
        answer!(reply, rename(), () => reply.ok());
    }

    fn link(&self, _: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let file = self.tree().locate(node.0);
        let linked = file.and_then(|file| {
            self.make(parent, name, |dir| linkat(CWD, file.path(), dir, name, AtFlags::SYMLINK_FOLLOW))
        });
        entry(reply, linked);
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.open_as(node, shared_flags(flags.0));
        answer!(reply, opened, handle => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let created = self.create_new(parent, name, mode, flags);
        answer!(reply, created, (found, handle) => {
            reply.created(&NAMES_VALID, &found, GENERATION, handle, FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; size as usize];
        let tree = self.tree();
        let read = tree.open_file(handle.0).and_then(|file| fill(file, offset, &mut data));
        answer!(reply, read, length => reply.data(&data[..length]));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let tree = self.tree();
        let written = tree.open_file(handle.0).and_then(|file| file.write_at(data, offset));
        answer!(reply, written, length => reply.written(length as u32));
    }

    /// Makes the kernel stop sending this request at each close(2).
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.tree().close(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        answer!(reply, self.sync(handle, data_only), () => reply.ok());
    }

    fn opendir(&self, _: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let opened = self.open_as(node, OFlags::RDONLY | OFlags::DIRECTORY);
        answer!(reply, opened, handle => reply.opened(handle, FopenFlags::empty()));
    }

    fn readdir(&self, _: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        answer!(reply, self.list(handle, offset, &mut reply), () => reply.ok());
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.tree().close(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        answer!(reply, self.sync(handle, data_only), () => reply.ok());
    }

    fn statfs(&self, _: &Request, node: INodeNo, reply: ReplyStatfs) {
        let status = self.tree().locate(node.0).and_then(|file| Ok(fstatvfs(file.as_fd())?));
        answer!(reply, status, of => reply.statfs(
            of.f_blocks,
            of.f_bfree,
            of.f_bavail,
            of.f_files,
            of.f_ffree,
            of.f_bsize as u32,
            of.f_namemax as u32,
            of.f_frsize as u32,
        ));
    }

    fn setxattr(
        &self,
        _: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let flags = XattrFlags::from_bits_retain(flags.cast_unsigned());
        let set = self.tree().locate(node.0).and_then(|file| Ok(setxattr(file.path(), name, value, flags)?));
        answer!(reply, set, () => reply.ok());
    }

    fn getxattr(&self, _: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let mut value = Vec::with_capacity(XATTR_MAX);
        let room = rustix::buffer::spare_capacity(&mut value);
        let got = self.tree().locate(node.0).and_then(|file| Ok(getxattr(file.path(), name, room)?));
        answer!(reply, got, _ => sized(reply, &value, size));
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let mut names = Vec::with_capacity(XATTR_MAX);
        let room = rustix::buffer::spare_capacity(&mut names);
        let got = self.tree().locate(node.0).and_then(|file| Ok(listxattr(file.path(), room)?));
        answer!(reply, got, _ => sized(reply, &names, size));
    }

    fn removexattr(&self, _: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.tree().locate(node.0).and_then(|file| Ok(removexattr(file.path(), name)?));
        answer!(reply, removed, () => reply.ok());
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let tree = self.tree();
        let done = tree.open_file(handle.0).and_then(|file| Ok(fallocate(file, mode, offset, length)?));
        answer!(reply, done, () => reply.ok());
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel sends only these two.
        let to = match whence {
            libc::SEEK_DATA => SeekFrom::Data(offset.cast_unsigned()),
            libc::SEEK_HOLE => SeekFrom::Hole(offset.cast_unsigned()),
            _ => return reply.error(Errno::EINVAL),
        };
        let tree = self.tree();
        let found = tree.open_file(handle.0).and_then(|file| Ok(seek(file, to)?));
        answer!(reply, found, at => reply.offset(at.cast_signed()));
    }
}

fn entry(reply: ReplyEntry, found: io::Result<FileAttr>) {
    answer!(reply, found, found => reply.entry_with_ttls(&ATTRIBUTES_VALID, &NAMES_VALID, &found, GENERATION));
}

/// Answers a request for the size (with room for 0 bytes) or for the data.
fn sized(reply: ReplyXattr, data: &[u8], size: u32) {
    match size as usize {
        0 => reply.size(data.len() as u32),
        room if room < data.len() => reply.error(Errno::ERANGE),
        _ => reply.data(data),
    }
}

/// Reads until the end of the file, until the buffer is full, or until an error; the bytes before an error
/// are returned.
fn fill(file: &fs::File, offset: u64, data: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < data.len() {
        match file.read_at(&mut data[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if filled == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(filled)
}
