//! The files of volumes that a container's processes use when they are dumped.
//!
//! A volume is not part of a checkpoint. CRIU opens its files again by their names, in the volume that the new
//! container has at the same place. This module finds the files for which that would fail, although CRIU dumps them:
//!
//! | what | why |
//! |---|---|
//! | a file that has another name now, or none although other hard links are left | CRIU makes a link for it that it removes after the dump |
//! | a removed file of a read-only volume, or one that is a volume by itself | CRIU cannot make the file again there |
//!
//! `watches.rs` does the same for watches (inotify, fanotify).
//!
//! This module also writes back what shared mappings have changed: a restored process reads those files from the host.
//!
//! The agent passes the volumes' requests on, so whatever looks at their files here runs in another thread than its
//! main one.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use machinen_protocol::{api::ExternalMount, shares};
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MMapPath, MountInfo, Process};
use rustix::fs::{
    AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags, makedev, statvfs, statx, syncfs,
};

use super::{CriuError, mounts};

/// The kernel marks a path that does not lead to the file any more with this.
const REMOVED: &str = " (deleted)";

/// The file system with the volumes of this VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VolumeDevice {
    major: u32,
    minor: u32,
}

/// A file that a process uses.
#[derive(Debug)]
struct UsedFile {
    /// Leads to the file itself, whatever its name is.
    link: PathBuf,
    /// Where the file was opened, as the container's first process sees it.
    path: String,
}

/// The mount of a volume in a container.
#[derive(Debug)]
struct VolumeMount {
    at: String,
    /// The path in the volumes' file system.
    root: String,
}

impl VolumeDevice {
    /// None if the container whose first process is `init` has no volumes. Those of the VM's other containers must not
    /// matter to it.
    ///
    /// # Errors
    /// The mounts cannot be read.
    pub(super) fn used_by(init: Pid) -> Result<Option<Self>, CriuError> {
        let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(CriuError::Inspect)?;
        let mount = mounts.into_iter().find(|mount| mount.mount_point == Path::new(shares::MOUNT_POINT));
        let device = mount.and_then(|mount| Self::of(&mount));
        Ok(device.filter(|device| !device.mounts(init, init).is_empty()))
    }

    /// The file system that is mounted at a path of the VM; None if none is.
    pub(super) fn mounted_at(path: &Path) -> Option<Self> {
        let status = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE).ok()?;
        let is_mounted = status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        is_mounted.then(|| Self::new(status.stx_dev_major, status.stx_dev_minor))
    }

    /// Describes the first file of this file system, which has secrets, that a process uses.
    pub(super) fn secret_used_by(self, pid: Pid) -> Option<String> {
        let file = used_files(pid).into_iter().find(|file| self.has(&file.link))?;
        let path = file.path.trim_end_matches(REMOVED).escape_debug().to_string();
        Some(format!("has {path} open, a secret, which no checkpoint has"))
    }

    fn of(mount: &MountInfo) -> Option<Self> {
        let (major, minor) = mount.majmin.split_once(':')?;
        Some(Self::new(major.parse().ok()?, minor.parse().ok()?))
    }

    pub(super) fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Whether this is the file system's number: the kernel's own, or that of stat(2).
    pub(super) fn is_device(self, number: u64) -> bool {
        let kernels = (u64::from(self.major) << 20) | u64::from(self.minor);
        number == kernels || number == makedev(self.major, self.minor)
    }

    /// Whether this file system is mounted there.
    pub(super) fn is_at(self, mount: &MountInfo) -> bool {
        Self::of(mount) == Some(self)
    }

    /// Whether a file is on this file system. Another file system of the same kind, whose server may be frozen, is
    /// not asked.
    fn has(self, link: &Path) -> bool {
        statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)
            .is_ok_and(|status| (status.stx_dev_major, status.stx_dev_minor) == (self.major, self.minor))
    }

    /// Describes the first file of a process that a restore could not open again. `init` is the container's first
    /// process. A process that has ended uses none.
    pub(super) fn why_not(self, init: Pid, pid: Pid) -> Option<String> {
        let mounts = self.mounts(init, pid);
        let mut used = used_files(pid).into_iter().filter(|file| self.has(&file.link));
        used.find_map(|file| {
            let why = lost(&file, &mounts)?;
            let path = file.path.trim_end_matches(REMOVED).escape_debug().to_string();
            Some(format!("uses {path}, a file of a volume {why}"))
        })
    }

    /// Writes back what the shared mappings of a process have changed, once for each file in `seen`.
    ///
    /// # Errors
    /// The host cannot write a file.
    pub(super) fn write_back(self, pid: Pid, seen: &mut HashSet<u64>) -> Result<(), CriuError> {
        for link in shared_mappings(pid).into_iter().filter(|link| self.has(link)) {
            let failed = |source| CriuError::File {
                what: "write back",
                path: fs::read_link(&link).unwrap_or_else(|_| link.clone()),
                source,
            };
            let file = match File::open(&link) {
                // The process has ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            if seen.insert(file.metadata().map_err(failed)?.ino()) {
                file.sync_data().map_err(failed)?;
            }
        }
        Ok(())
    }

    /// The mounts of volumes that a process sees. Those of the first process are the same in the same namespace, and
    /// are known from its root, whatever the root of the other process is.
    fn mounts(self, init: Pid, pid: Pid) -> Vec<VolumeMount> {
        let namespace = |pid: Pid| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let of = if namespace(init) == namespace(pid) { init } else { pid };
        let mounts = Process::new(of.as_raw()).and_then(|process| process.mountinfo());
        let mounts = mounts.into_iter().flatten().filter(|mount| self.is_at(mount));
        mounts
            .map(|mount| VolumeMount {
                at: mounts::unescaped(&mount.mount_point.to_string_lossy()),
                root: mounts::unescaped(&mount.root),
            })
            .collect()
    }
}

/// Starts writing back what is in the guest's memory of all volumes.
///
/// # Errors
/// Those of the file system.
pub(super) fn write_back_all() -> Result<(), CriuError> {
    let path = Path::new(shares::MOUNT_POINT);
    let written = File::open(path).and_then(|root| Ok(syncfs(root)?));
    written.map_err(|source| CriuError::File { what: "write back", path: path.to_owned(), source })
}

/// Whether a mount of a container shows a volume.
pub(super) fn is_volume(mount: &ExternalMount) -> bool {
    shares::ShareEntry::of_path(Path::new(&mount.source)).is_some()
}

/// Everything that a process has open or mapped, executes, or is in.
fn used_files(pid: Pid) -> Vec<UsedFile> {
    let at = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let below = |name| fs::read_dir(at(name)).into_iter().flatten().flatten().map(|entry| entry.path());
    let links = below("fd").chain(below("map_files")).chain([at("exe"), at("cwd"), at("root")]);
    let used = links.filter_map(|link| {
        let path = fs::read_link(&link).ok()?.to_string_lossy().into_owned();
        path.starts_with('/').then_some(UsedFile { link, path })
    });
    used.collect()
}

/// Links to the files that a process has mapped for sharing.
fn shared_mappings(pid: Pid) -> Vec<PathBuf> {
    let maps = Process::new(pid.as_raw()).and_then(|process| process.maps());
    maps.into_iter()
        .flatten()
        .filter(|map| map.perms.contains(MMPermissions::SHARED) && matches!(map.pathname, MMapPath::Path(_)))
        .map(|map| format!("/proc/{pid}/map_files/{:x}-{:x}", map.address.0, map.address.1).into())
        .collect()
}

/// Why a file of a volume could not be opened again. None also if the file cannot be examined, since its process has
/// ended.
fn lost(file: &UsedFile, mounts: &[VolumeMount]) -> Option<&'static str> {
    let status = fs::metadata(&file.link).ok()?;
    let path = file.path.trim_end_matches(REMOVED);
    let place = place(path, mounts);
    if status.nlink() == 0 {
        let is_single_file = place.as_deref().is_some_and(is_volume_itself);
        let read_only = statvfs(&file.link).ok()?.f_flag.contains(StatVfsMountFlags::RDONLY);
        return match (is_single_file, read_only) {
            (true, _) => Some("that the host has removed or replaced"),
            (false, true) => Some("that is read-only, from which the file was removed"),
            // CRIU saves its content, and makes it again.
            (false, false) => None,
        };
    }
    let found = place.and_then(|place| fs::symlink_metadata(place).ok());
    let is_there = found.is_some_and(|found| (found.dev(), found.ino()) == (status.dev(), status.ino()));
    (!is_there).then_some("that was renamed or replaced after it was opened")
}

/// The path of a file in the agent's own mount of the volumes.
fn place(path: &str, mounts: &[VolumeMount]) -> Option<PathBuf> {
    let below = |mount: &&VolumeMount| Path::new(path).starts_with(&mount.at);
    let mount = mounts.iter().filter(below).max_by_key(|mount| mount.at.len())?;
    let rest = Path::new(path).strip_prefix(&mount.at).ok()?;
    let root = Path::new(shares::MOUNT_POINT).join(mount.root.trim_start_matches('/'));
    // A path that ends with a slash would lead to a directory only.
    Some(if rest.as_os_str().is_empty() { root } else { root.join(rest) })
}

fn is_volume_itself(place: &Path) -> bool {
    shares::ShareEntry::of_path(place).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_in_the_agents_own_mount() {
        let mount = |at: &str, root: &str| VolumeMount { at: at.to_owned(), root: root.to_owned() };
        let mounts = [mount("/data", "/dir-0"), mount("/data/sub", "/dir-1"), mount("/etc/f", "/file-2")];
        for (path, expected) in [
            ("/data", "dir-0"),
            ("/data/a/b", "dir-0/a/b"),
            ("/data/sub/a", "dir-1/a"),
            ("/data/sub2", "dir-0/sub2"),
            ("/etc/f", "file-2"),
        ] {
            assert_eq!(place(path, &mounts), Some(Path::new(shares::MOUNT_POINT).join(expected)), "{path}");
        }
        assert_eq!(place("/database", &mounts), None);
        assert!(is_volume_itself(&place("/etc/f", &mounts).unwrap()));
    }

    #[test]
    fn files_of_other_file_systems_are_not_examined() {
        let pid = nix::unistd::getpid();
        let none = VolumeDevice::new(0, 0);
        assert_eq!(none.why_not(pid, pid), None);
        assert!(none.write_back(pid, &mut HashSet::new()).is_ok());
        assert!(!used_files(pid).is_empty() && used_files(Pid::from_raw(i32::MAX)).is_empty());
    }
}
