//! The mounts of a container whose source is outside the container, which CRIU does not find by itself.

use std::{
    collections::{HashMap, HashSet},
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use machinen_protocol::{api::ExternalMount, copies, secrets::MOUNT_SOURCE, shares};
use nix::unistd::Pid;
use pathrs::{InodeType, Root};
use procfs::process::{MountInfo, Process};
use tokio::task::spawn_blocking;

use super::{CriuError, volumes};
use crate::{
    container::copies::DIR,
    engine::{MountPoint, PointInVolume},
};

/// The tmpfs with the secrets of a container, in the agent's directory of it.
pub(crate) const SECRETS_DIR: &str = "secrets";
/// File systems that CRIU mounts anew, although they are the same as the VM's.
const REMADE: [&str; 5] = ["proc", "sysfs", "cgroup2", "mqueue", "devpts"];

/// Creates mount points that new volumes lack. The engine does so for a new container. The agent's main thread serves the
/// volumes and must not wait for them, so this is done in another one.
///
/// # Errors
/// Those of the file system: the volume is read-only.
pub(crate) async fn make_points_in_volumes(points: &[PointInVolume]) -> Result<(), CriuError> {
    if points.is_empty() {
        return Ok(());
    }
    let points = points.to_vec();
    let make = move || {
        points.into_iter().try_for_each(|PointInVolume { volume, point, destination }| {
            make_mount_points(&volume, &[point]).map_err(|error| match error {
                CriuError::MountPoint { source, .. } => CriuError::MountPoint { path: destination, source },
                other => other,
            })
        })
    };
    spawn_blocking(make).await.map_err(CriuError::Thread)?
}

/// The devices of the file systems that the agent has mounted at these paths.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(super) fn devices_at(paths: &[PathBuf]) -> Result<Vec<String>, CriuError> {
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(CriuError::Inspect)?;
    let mounts = mounts.into_iter().filter(|mount| paths.contains(&mount.mount_point));
    Ok(mounts.map(|mount| mount.majmin).collect())
}

/// Finds these mounts in the container whose init is `init`; `dir` is the agent's directory of the container.
///
/// # Errors
/// Those of reading /proc/PID/mountinfo.
pub(super) fn external(init: Pid, dir: &Path) -> Result<Vec<ExternalMount>, CriuError> {
    let of = |process: Result<Process, _>| process.and_then(|process| process.mountinfo());
    let ours = of(Process::myself()).map_err(CriuError::Inspect)?;
    let theirs = of(Process::new(init.as_raw())).map_err(CriuError::Inspect)?;
    Ok(among(ours.into_iter().collect(), theirs.into_iter().collect(), dir))
}

fn among(ours: Vec<MountInfo>, theirs: Vec<MountInfo>, dir: &Path) -> Vec<ExternalMount> {
    let (files, all_copies, secrets) = (dir.join("files"), dir.join(DIR), dir.join(SECRETS_DIR));
    let copy_at = |at: &Path| -> Option<usize> {
        let below = at.strip_prefix(&all_copies).ok()?.to_str()?;
        below.strip_suffix("/rootfs")?.parse().ok()
    };
    // Mount points of the VM at which a whole file system is mounted, by file system.
    let whole: HashMap<String, PathBuf> = ours
        .into_iter()
        .filter(|mount| mount.root == "/" && !REMADE.contains(&mount.fs_type.as_str()))
        .map(|mount| (mount.majmin, mount.mount_point))
        .collect();
    let outside = theirs.into_iter().filter(|mount| mount.mount_point != Path::new("/"));
    let mut seen = HashSet::new();
    outside
        .filter_map(|mount| {
            let at = whole.get(&mount.majmin)?;
            let source = at.join(unescaped(&mount.root).trim_start_matches('/'));
            let destination = unescaped(&mount.mount_point.display().to_string());
            if let Some(number) = copy_at(at) {
                // CRIU itself finds other mounts of it.
                let source = copies::source(number);
                let is_first = mount.root == "/" && seen.insert(source.clone());
                return is_first.then_some(ExternalMount { destination, source, ..Default::default() });
            }
            let source = match () {
                () if source.starts_with(&files) => String::new(),
                () if *at == secrets => MOUNT_SOURCE.to_owned(),
                () => source.display().to_string(),
            };
            let found = ExternalMount { destination, source, ..Default::default() };
            // CRIU itself finds what the container has mounted: other mounts of its root and of its volumes, or of a
            // part of these.
            let is_inside = at.ends_with("rootfs")
                || at == Path::new(shares::MOUNT_POINT)
                    && !(volumes::is_volume(&found) && seen.insert(found.source.clone()));
            (!is_inside).then_some(found)
        })
        .collect()
}

/// A path in /proc/PID/mountinfo, where spaces, tabs, newlines and backslashes are octal numbers (proc(5)).
pub(super) fn unescaped(path: &str) -> String {
    [(r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")]
        .into_iter()
        .fold(path.to_owned(), |path, (escaped, char)| path.replace(escaped, char))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(lines: &[&str]) -> Vec<MountInfo> {
        lines.iter().map(|line| MountInfo::from_line(line).unwrap()).collect()
    }

    #[test]
    fn a_volume_is_external_once() {
        let ours = [
            "20 1 0:20 / /run rw - tmpfs run rw",
            "21 20 0:30 / /run/machinen-shares rw - fuse.machinen machinen rw",
            "22 20 0:31 / /run/machinen/c/rootfs rw - overlay overlay rw",
            "23 20 0:32 / /run/machinen/c/copies/1/rootfs rw - overlay overlay rw",
            "24 20 0:33 / /run/machinen/c/secrets rw - tmpfs secrets rw",
        ];
        let theirs = [
            "30 1 0:31 / / rw - overlay overlay rw",
            "31 30 0:30 /dir-0 /my\\040data rw - fuse.machinen machinen rw",
            "32 30 0:30 /file-1 /etc/f ro - fuse.machinen machinen rw",
            "33 30 0:30 /dir-0 /again rw - fuse.machinen machinen rw",
            "34 30 0:30 /dir-0/sub /part rw - fuse.machinen machinen rw",
            "35 30 0:20 /machinen/c/files/0 /etc/hosts rw - tmpfs run rw",
            "40 30 0:33 / /run/secrets rw - tmpfs secrets rw",
            "36 30 0:31 /var /mnt rw - overlay overlay rw",
            "37 30 0:32 / /copy rw - overlay overlay rw",
            "38 30 0:32 / /copied rw - overlay overlay rw",
            "39 30 0:32 /sub /sub rw - overlay overlay rw",
        ];
        let found = among(mounts(&ours), mounts(&theirs), Path::new("/run/machinen/c"));
        let found: Vec<_> =
            found.iter().map(|mount| (mount.destination.as_str(), mount.source.as_str())).collect();
        let expected = [
            ("/my data", "/run/machinen-shares/dir-0"),
            ("/etc/f", "/run/machinen-shares/file-1"),
            ("/etc/hosts", ""),
            ("/run/secrets", MOUNT_SOURCE),
            ("/copy", "machinen-copy:1"),
        ];
        assert_eq!(found, expected);
    }
}
