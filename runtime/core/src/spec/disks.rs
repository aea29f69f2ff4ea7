//! Block devices of the host that a configuration gives to its container: devices, and file systems on them.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};

/// Types of file systems on disks that the guest's kernel has.
pub(super) const DISK_KINDS: &[&str] = &["ext4", "erofs", "squashfs"];

/// Where a block device of the host appears in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A device in `linux.devices`, by its numbers on the host.
    Device {
        /// The path in the container.
        path: PathBuf,
        /// The major number.
        major: u32,
        /// The minor number.
        minor: u32,
    },
    /// A file system on a device.
    Mount {
        /// The place of the mount among the configuration's mounts.
        mount: usize,
        /// The path of the device on the host.
        source: PathBuf,
        /// The path in the container.
        destination: PathBuf,
    },
}

/// A block device of the host that the container uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRequest {
    /// Where the configuration has it.
    pub source: DiskSource,
    /// The container cannot write to it.
    pub read_only: bool,
}

impl DiskRequest {
    /// The device of a mount, the one with this number among the configuration's mounts, if it is one of a file system on
    /// a disk.
    pub(super) fn of_mount(mount: &Mount, number: usize) -> Option<Self> {
        let kind = mount.typ().as_deref()?;
        if !DISK_KINDS.contains(&kind) {
            return None;
        }
        // The kernel writes to the journal of an ext4 that is mounted read-only, unless the device is read-only.
        let last = mount.options().iter().flatten().rfind(|option| ["ro", "rw"].contains(&option.as_str()));
        let read_only = kind != "ext4" || last.is_some_and(|option| option == "ro");
        let source = DiskSource::Mount {
            mount: number,
            source: mount.source().clone().unwrap_or_default(),
            destination: mount.destination().clone(),
        };
        Some(Self { source, read_only })
    }

    /// The block devices in `linux.devices`.
    pub(super) fn of_devices(linux: &Linux) -> impl Iterator<Item = Self> {
        linux.devices().iter().flatten().filter(|device| device.typ() == LinuxDeviceType::B).map(|device| {
            let number = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
            let (major, minor) = (number(device.major()), number(device.minor()));
            let source = DiskSource::Device { path: device.path().clone(), major, minor };
            Self { source, read_only: !may_write(linux, device) }
        })
    }
}

/// Whether the rules of the configuration allow to write to a device: the last one that is about it counts.
fn may_write(linux: &Linux, device: &LinuxDevice) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    let about = |rule: &&LinuxDeviceCgroup| {
        let matches = |rule: Option<i64>, number| rule.is_none_or(|rule| rule < 0 || rule == number);
        matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
            && matches(rule.major(), device.major())
            && matches(rule.minor(), device.minor())
            && rule.access().as_deref().is_none_or(|access| access.is_empty() || access.contains('w'))
    };
    rules.into_iter().flatten().rfind(about).is_some_and(LinuxDeviceCgroup::allow)
}

/// Names the devices of mounts as the agent knows them, by their numbers on the host.
pub(crate) fn set_sources(spec: &mut Spec, mounted: impl IntoIterator<Item = (usize, u32, u32)>) {
    let Some(mounts) = spec.mounts_mut() else { return };
    for (mount, major, minor) in mounted {
        if let Some(mount) = mounts.get_mut(mount) {
            mount.set_source(Some(Path::new("/dev/block").join(format!("{major}:{minor}"))));
        }
    }
}
