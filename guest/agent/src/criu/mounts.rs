//! The mounts of a container whose source is outside the container, which CRIU does not find by itself.

use std::{
    collections::HashMap,
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use machinen_protocol::api::ExternalMount;
use nix::unistd::Pid;
use pathrs::{InodeType, Root};
use procfs::process::{MountInfo, Process};

use super::CriuError;
use crate::engine::MountPoint;

/// File systems that CRIU mounts anew, although they are the same as the VM's.
const REMADE: [&str; 5] = ["proc", "sysfs", "cgroup2", "mqueue", "devpts"];

/// Finds these mounts in the container whose init is `init`; `files` is the directory in which the agent
/// keeps the container's files.
///
/// # Errors
/// Those of reading /proc/PID/mountinfo.
pub(super) fn external(init: Pid, files: &Path) -> Result<Vec<ExternalMount>, CriuError> {
    let of = |process: Result<Process, _>| process.and_then(|process| process.mountinfo());
    let ours = of(Process::myself()).map_err(CriuError::Inspect)?;
    let theirs = of(Process::new(init.as_raw())).map_err(CriuError::Inspect)?;
    Ok(among(ours.into_iter().collect(), theirs.into_iter().collect(), files))
}

fn among(ours: Vec<MountInfo>, theirs: Vec<MountInfo>, files: &Path) -> Vec<ExternalMount> {
    // Mount points of the VM at which a whole file system is mounted, by file system.
    let whole: HashMap<String, PathBuf> = ours
        .into_iter()
        .filter(|mount| mount.root == "/" && !REMADE.contains(&mount.fs_type.as_str()))
        .map(|mount| (mount.majmin, mount.mount_point))
        .collect();
    let outside = theirs.into_iter().filter(|mount| mount.mount_point != Path::new("/"));
    outside
        .filter_map(|mount| {
            let at = whole.get(&mount.majmin)?;
            let source = at.join(mount.root.trim_start_matches('/'));
            let source = if source.starts_with(files) { String::new() } else { source.display().to_string() };
            let destination = mount.mount_point.display().to_string();
            // CRIU itself finds another mount of the container's own root.
            (!at.ends_with("rootfs")).then(|| ExternalMount { destination, source, ..Default::default() })
        })
        .collect()
}

/// Creates mount points that a new root file system lacks. The engine does so for a new container.
///
/// # Errors
/// Those of the file system.
pub(crate) fn make_mount_points(rootfs: &Path, points: &[MountPoint]) -> Result<(), CriuError> {
    let cannot = |path: &Path| {
        let path = path.to_owned();
        move |source| CriuError::MountPoint { path, source: Box::new(source) }
    };
    let root = Root::open(rootfs).map_err(cannot(rootfs))?;
    for MountPoint { path, is_file } in points {
        if root.resolve(path).is_ok() {
            continue;
        }
        let dir = if *is_file { path.parent().unwrap_or(path) } else { path };
        root.mkdir_all(dir, &Permissions::from_mode(0o755)).map_err(cannot(dir))?;
        if *is_file {
            root.create(path, &InodeType::File(Permissions::from_mode(0o644))).map_err(cannot(path))?;
        }
    }
    Ok(())
}
