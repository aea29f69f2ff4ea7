//! The directory that a share server serves: a file system in memory that has the volumes and nothing else.
//!
//! ```text
//!   /volumes          the file system, read-only for the server
//!   /volumes/dir-0    a volume
//!   /volumes/file-1   a volume that is a single file
//! ```
//! It exists in the server's mount namespace only. Whatever name the server may be made to open, `..` and links
//! included, it ends in a volume or in this directory: the path of the host above a volume is not mounted there.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use machinen_base::mounts::{ChildMounts, TreeOptions, clone_tree};
use machinen_protocol::shares::ShareEntry;
use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string,
        fsmount, fsopen, move_mount,
    },
};

/// The path in the server's root.
pub(super) const VOLUMES: &str = "/volumes";

/// Entries that a pod may have at once.
const MAX_ENTRIES: &str = "4096";

#[derive(Debug)]
pub(super) struct ShareRoot {
    server: ChildMounts,
    /// The same file system as at [`VOLUMES`]. It is covered there, so only this process can write to it.
    writable: OwnedFd,
}

impl ShareRoot {
    /// Mounts the directory for the process `server`, a child that has not been reaped. Blocks.
    ///
    /// # Errors
    /// Those of mount(2), or the server has ended.
    pub(super) fn mount(server: u32) -> io::Result<Self> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in
            [("source", "machinen"), ("mode", "0755"), ("size", "64k"), ("nr_inodes", MAX_ENTRIES)]
        {
            fsconfig_set_string(&context, key, value)?;
        }
        fsconfig_create(&context)?;
        let harmless = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let writable = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, harmless)?;
        let server = ChildMounts::of(server)?;
        server.enter(|| {
            attach(&writable, Path::new(VOLUMES))?;
            // A mount of the same files covers the first one.
            let read_only = TreeOptions { recursive: false, read_only: true, follows_host: false };
            attach(&clone_tree(writable.as_fd(), read_only)?, Path::new(VOLUMES))
        })?;
        Ok(Self { server, writable })
    }

    /// Mounts a volume. Blocks.
    ///
    /// # Errors
    /// Those of mount(2), there are too many volumes, or the server has ended.
    pub(super) fn add(&self, entry: ShareEntry, tree: &OwnedFd) -> io::Result<()> {
        let name = entry.name();
        if entry.is_file {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(&self.writable, &*name, flags, Mode::from_raw_mode(0o444))?;
        } else {
            mkdirat(&self.writable, &*name, Mode::from_raw_mode(0o555))?;
        }
        self.server
            .enter(|| attach(tree, &place(entry)))
            .inspect_err(|_| drop(self.remove_mount_point(entry)))
    }

    /// Unmounts a volume. The server may keep files in it open until the guest has forgotten them. Blocks.
    ///
    /// # Errors
    /// Those of umount2(2), or the server has ended.
    pub(super) fn remove(&self, entry: ShareEntry) -> io::Result<()> {
        self.server
            .enter(|| Ok(umount2(&place(entry), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?))?;
        self.remove_mount_point(entry)
    }

    fn remove_mount_point(&self, entry: ShareEntry) -> io::Result<()> {
        let flags = if entry.is_file { AtFlags::empty() } else { AtFlags::REMOVEDIR };
        Ok(unlinkat(&self.writable, &*entry.name(), flags)?)
    }
}

fn place(entry: ShareEntry) -> PathBuf {
    Path::new(VOLUMES).join(entry.name())
}

fn attach(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    Ok(move_mount(mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}
