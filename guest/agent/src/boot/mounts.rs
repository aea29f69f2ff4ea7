//! Mounts the file systems that user space needs first.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
};

use super::BootError;
use crate::cgroup;

struct Mount {
    fstype: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// The kernel has mounted devtmpfs on /dev already (CONFIG_DEVTMPFS_MOUNT).
const ALL: [Mount; 6] = [
    Mount { fstype: "proc", target: "/proc", flags: SAFE, data: "" },
    Mount { fstype: "sysfs", target: "/sys", flags: SAFE, data: "" },
    // nsdelegate: a container's cgroup namespace is a boundary even if its cgroup file system is writable.
    Mount { fstype: "cgroup2", target: cgroup::ROOT, flags: SAFE, data: "nsdelegate" },
    Mount {
        fstype: "tmpfs",
        target: "/run",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=755",
    },
    Mount {
        fstype: "tmpfs",
        target: "/tmp",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        data: "mode=1777",
    },
    Mount {
        fstype: "devpts",
        target: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=620,ptmxmode=666",
    },
];

pub(super) fn mount_all() -> Result<(), BootError> {
    for entry in &ALL {
        let target = Path::new(entry.target);
        match mount(Some(entry.fstype), target, Some(entry.fstype), entry.flags, Some(entry.data)) {
            Ok(()) => {}
            // devtmpfs starts empty, while the image has all mount points.
            Err(Errno::ENOENT) if target.starts_with("/dev") => {
                fs::create_dir(target)
                    .map_err(|source| BootError::Create { path: target.to_owned(), source })?;
                mount(Some(entry.fstype), target, Some(entry.fstype), entry.flags, Some(entry.data))
                    .map_err(|source| BootError::Mount {
                        fstype: entry.fstype,
                        target: target.to_owned(),
                        source,
                    })?;
            }
            Err(source) => {
                return Err(BootError::Mount { fstype: entry.fstype, target: target.to_owned(), source });
            }
        }
    }
    Ok(())
}

/// Enables all controllers for the containers' cgroups, and makes the parent of these cgroups.
pub(super) fn prepare_cgroups() -> Result<(), BootError> {
    let root = Path::new(cgroup::ROOT);
    let parent = root.join(cgroup::PARENT);
    fs::create_dir_all(&parent).map_err(|source| BootError::Create { path: parent.clone(), source })?;
    for dir in [root, &parent] {
        cgroup::enable_controllers(dir)?;
    }
    Ok(())
}

/// Finds the mount point of a host's cgroup v2 hierarchy in /proc/self/mountinfo (proc(5)).
pub(super) fn find_cgroup2(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        (file_system.split(' ').next()? == "cgroup2").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_hosts_cgroup2_is_found() {
        let mountinfo = "25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                         26 25 0:23 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                         34 25 0:31 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(mountinfo), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_cgroup2("25 1 0:22 / / rw - ext4 /dev/vda rw\n"), None);
    }
}
