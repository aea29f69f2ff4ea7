//! Block devices of the host that a container uses: disks of the VM with other numbers than on the host.
//!
//! The configuration has the host's numbers, in its devices, in the rules about devices, and as the sources of mounts
//! (`/dev/block/MAJOR:MINOR`). The agent mounts the file systems on the disks, and containers get bind mounts of them: so
//! the container needs no right to use the device, and a file system on a disk that cannot be written is read-only itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use machinen_protocol::{
    api,
    error::{ErrorKind, HasKind},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{major, minor, stat},
};
use serde_json::Value;

use crate::{
    console,
    disk::{Disk, DiskError, DiskSource, ScsiAddress},
};

/// Where the agent mounts file systems.
const MOUNT_POINTS: &str = "/run/machinen-disks";
/// Options that a bind mount has; the file system gets the others.
const BIND_OPTIONS: [&str; 20] = [
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "atime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "nodiratime",
    "diratime",
    "private",
    "rprivate",
    "slave",
    "rslave",
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum HostDiskError {
    #[error("a block device of the host has no disk")]
    NoDisk,
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot examine the disk of a block device of the host")]
    Examine(#[source] io::Error),
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot mount the block device of the host at {destination} with the type {kind}")]
    Mount { destination: String, kind: String, source: Errno },
    #[error("the configuration is not JSON")]
    Config(#[from] serde_json::Error),
}

impl HasKind for HostDiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDisk | Self::Config(_) => ErrorKind::InvalidArgument,
            Self::Disk(_) => ErrorKind::NotFound,
            Self::Mount { .. } => ErrorKind::FailedPrecondition,
            Self::Examine(_) | Self::Create { .. } => ErrorKind::Internal,
        }
    }
}

/// A disk of this VM that is a block device of the host.
#[derive(Debug)]
struct HostDisk {
    on_host: (u64, u64),
    here: (u64, u64),
    path: PathBuf,
    read_only: bool,
}

/// File systems that are mounted for a container.
#[derive(Debug, Default)]
pub(super) struct DiskMounts(Mutex<Vec<PathBuf>>);

impl DiskMounts {
    /// Completes the file systems on their disks and unmounts them. The container's own mounts of them disappear a little
    /// later than its processes.
    pub(super) fn release(&self) {
        for path in std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)) {
            let none = None::<&str>;
            let completed = mount(none, &path, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none);
            let released = completed.and(umount2(&path, MntFlags::MNT_DETACH));
            if let Err(err) = released.map_err(io::Error::from).and_then(|()| fs::remove_dir(&path)) {
                console::say(&format!("cannot release {}: {err}", path.display()));
            }
        }
    }

    fn mount(&self, id: &str, disk: &HostDisk, entry: &mut Value) -> Result<(), HostDiskError> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut mounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let path = Path::new(MOUNT_POINTS).join(format!("{id}-{}", mounts.len()));
        fs::create_dir_all(&path).map_err(|source| HostDiskError::Create { path: path.clone(), source })?;
        let options: Vec<_> = entry["options"].as_array().into_iter().flatten().map(text).collect();
        let (bind, data): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|option| BIND_OPTIONS.contains(&option.as_str()));
        let flags = if disk.read_only { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        let (kind, data) = (text(&entry["type"]), data.join(","));
        mount(Some(&disk.path), &path, Some(kind.as_str()), flags, Some(data.as_str())).map_err(
            |source| {
                // The error of the mount says more than one of the removal would.
                let _ = fs::remove_dir(&path);
                HostDiskError::Mount { destination: text(&entry["destination"]), kind, source }
            },
        )?;
        entry["type"] = "bind".into();
        entry["source"] = path.display().to_string().into();
        entry["options"] = bind.into_iter().chain(["bind".to_owned()]).collect();
        mounts.push(path);
        Ok(())
    }
}

impl Drop for DiskMounts {
    fn drop(&mut self) {
        self.release();
    }
}

/// Waits for the disks of the request, gives the configuration their numbers, and mounts their file systems.
///
/// # Errors
/// A disk does not appear, or has no such file system.
pub(super) async fn provide(
    source: &DiskSource,
    request: &mut api::CreateContainerRequest,
) -> Result<DiskMounts, HostDiskError> {
    let mounts = DiskMounts::default();
    if request.host_disks.is_empty() {
        return Ok(mounts);
    }
    let mut disks = Vec::new();
    for disk in std::mem::take(&mut request.host_disks) {
        let address = ScsiAddress::from(disk.disk.as_ref().ok_or(HostDiskError::NoDisk)?);
        let Disk::Block { device, .. } = source.find_one(address, disk.read_only).await? else {
            return Err(HostDiskError::NoDisk);
        };
        let numbers = stat(&device).map_err(|errno| HostDiskError::Examine(errno.into()))?.st_rdev;
        let here = (major(numbers), minor(numbers));
        let on_host = (disk.major.into(), disk.minor.into());
        disks.push(HostDisk { on_host, here, path: device, read_only: disk.read_only });
    }
    let mut config: Value = serde_json::from_slice(&request.oci_config)?;
    renumber(&mut config, &disks);
    for entry in config["mounts"].as_array_mut().into_iter().flatten() {
        if let Some(disk) = disks.iter().find(|disk| disk.is_source_of(entry)) {
            mounts.mount(&request.container_id, disk, entry)?;
        }
    }
    request.oci_config = serde_json::to_vec(&config)?;
    Ok(mounts)
}

impl HostDisk {
    fn is_source_of(&self, mount: &Value) -> bool {
        mount["source"] == format!("/dev/block/{}:{}", self.on_host.0, self.on_host.1)
    }
}

fn renumber(config: &mut Value, disks: &[HostDisk]) {
    let linux = &mut config["linux"];
    for list in ["/devices", "/resources/devices"] {
        for device in linux.pointer_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let numbers = device["major"].as_u64().zip(device["minor"].as_u64());
            let found = disks.iter().find(|disk| Some(disk.on_host) == numbers);
            if let Some(disk) = found.filter(|_| device["type"] == "b") {
                (device["major"], device["minor"]) = (disk.here.0.into(), disk.here.1.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_of_the_host_are_replaced_once() {
        let disk = |minor, here, path: &str| HostDisk {
            on_host: (7, minor),
            here: (8, here),
            path: path.into(),
            read_only: true,
        };
        // The numbers of one disk here are those of another one on the host.
        let disks = [disk(0, 32, "/dev/sdc"), HostDisk { on_host: (8, 32), ..disk(1, 48, "/dev/sdd") }];
        let mut config = json!({
            "linux": {
                "devices": [
                    {"path": "/dev/a", "type": "b", "major": 7, "minor": 0},
                    {"path": "/dev/b", "type": "b", "major": 8, "minor": 32},
                    {"path": "/dev/c", "type": "c", "major": 7, "minor": 0},
                ],
                "resources": {"devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "rw"},
                ]},
            },
        });
        renumber(&mut config, &disks);
        assert!(disks[0].is_source_of(&json!({"source": "/dev/block/7:0"})));
        assert!(!disks[0].is_source_of(&json!({"source": "/dev/block/7:00"})));
        let minors = |list: &str| {
            let all = config.pointer(list).unwrap().as_array().unwrap();
            all.iter().map(|device| (device["major"].as_u64(), device["minor"].as_u64())).collect::<Vec<_>>()
        };
        assert_eq!(minors("/linux/devices"), [(Some(8), Some(32)), (Some(8), Some(48)), (Some(7), Some(0))]);
        assert_eq!(minors("/linux/resources/devices"), [(None, None), (Some(8), Some(32))]);
    }
}
