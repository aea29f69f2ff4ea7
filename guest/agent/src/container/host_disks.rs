//! Block devices of the host that a container uses: disks of the VM with other numbers than on the host.
//!
//! The configuration has the host's numbers, in its devices, in the rules about devices, and as the sources of mounts
//! (`/dev/block/MAJOR:MINOR`).

use std::{
    io,
    path::{Path, PathBuf},
};

use machinen_protocol::{
    api,
    error::{ErrorKind, HasKind},
};
use nix::sys::stat::{major, minor, stat};
use serde_json::{Value, json};

use crate::disk::{Disk, DiskError, DiskSource, ScsiAddress};

#[derive(Debug, thiserror::Error)]
pub(crate) enum HostDiskError {
    #[error("a block device of the host has no disk")]
    NoDisk,
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot examine the disk of a block device of the host")]
    Examine(#[source] io::Error),
    #[error("the configuration is not JSON")]
    Config(#[from] serde_json::Error),
}

impl HasKind for HostDiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDisk | Self::Config(_) => ErrorKind::InvalidArgument,
            Self::Disk(_) => ErrorKind::NotFound,
            Self::Examine(_) => ErrorKind::Internal,
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

/// Waits for the disks of the request, and gives the configuration their numbers.
///
/// # Errors
/// A disk does not appear.
pub(super) async fn translate(
    source: &DiskSource,
    request: &mut api::CreateContainerRequest,
) -> Result<(), HostDiskError> {
    if request.host_disks.is_empty() {
        return Ok(());
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
    rewrite(&mut config, &disks);
    request.oci_config = serde_json::to_vec(&config)?;
    Ok(())
}

fn rewrite(config: &mut Value, disks: &[HostDisk]) {
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
    let mut mounted = Vec::new();
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        let source = Path::new(mount["source"].as_str().unwrap_or_default());
        let named = |disk: &&HostDisk| {
            source == Path::new(&format!("/dev/block/{}:{}", disk.on_host.0, disk.on_host.1))
        };
        if let Some(disk) = disks.iter().find(named) {
            mount["source"] = disk.path.display().to_string().into();
            mounted.push(disk);
        }
    }
    if mounted.is_empty() {
        return;
    }
    // The container's init mounts the file system, and may use only the devices of its cgroup.
    let rule = |disk: &HostDisk| {
        let access = if disk.read_only { "r" } else { "rw" };
        json!({"allow": true, "type": "b", "major": disk.here.0, "minor": disk.here.1, "access": access})
    };
    let rules = &mut config["linux"]["resources"]["devices"];
    let added = mounted.into_iter().map(rule);
    *rules = rules.as_array().into_iter().flatten().cloned().chain(added).collect();
}

#[cfg(test)]
mod tests {
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
            "mounts": [
                {"destination": "/a", "type": "ext4", "source": "/dev/block/7:0"},
                {"destination": "/b", "type": "tmpfs", "source": "tmpfs"},
            ],
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
        rewrite(&mut config, &disks);
        assert_eq!(config["mounts"][0]["source"], "/dev/sdc");
        assert_eq!(config["mounts"][1]["source"], "tmpfs");
        let minors = |list: &str| {
            let all = config.pointer(list).unwrap().as_array().unwrap();
            all.iter().map(|device| (device["major"].as_u64(), device["minor"].as_u64())).collect::<Vec<_>>()
        };
        assert_eq!(minors("/linux/devices"), [(Some(8), Some(32)), (Some(8), Some(48)), (Some(7), Some(0))]);
        let rule = (Some(8), Some(32));
        assert_eq!(minors("/linux/resources/devices"), [(None, None), rule, rule]);
        assert_eq!(config.pointer("/linux/resources/devices/2/access").unwrap(), "r");
    }
}
