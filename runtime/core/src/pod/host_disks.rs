//! Block devices of the host that a container uses, opened before anything is changed.
//!
//! They become disks of the VM. One that the container can write to is opened exclusively, so the host's kernel mounts it
//! nowhere meanwhile, and no other container writes to it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::error::{ErrorKind, HasKind};
use rustix::fs::{FileType, fstat, major, minor, stat};

use crate::spec::disks::{DiskRequest, DiskSource};

/// Why a block device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostDiskError {
    /// The source of a mount is no block device.
    #[error(
        "{}, the source of the mount {}, is no block device, which a file system of that type has to be on",
        path.display(), destination.display()
    )]
    Source {
        /// The path on the host.
        path: PathBuf,
        /// The path in the container.
        destination: PathBuf,
    },
    /// The source of a mount cannot be examined.
    #[error("cannot examine {}, the source of the mount {}", path.display(), destination.display())]
    Examine {
        /// The path on the host.
        path: PathBuf,
        /// The path in the container.
        destination: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The host has no such device.
    #[error("this host has no block device {major}:{minor}, which {} is in the configuration", path.display())]
    NoDevice {
        /// The path in the container.
        path: PathBuf,
        /// The major number.
        major: u32,
        /// The minor number.
        minor: u32,
        /// The cause.
        source: io::Error,
    },
    /// A process, a mount or a container has the device.
    #[error("{} is in use on this host, as by a mount: only one may write to it; read-only it can be shared", path.display())]
    InUse {
        /// The device on the host.
        path: PathBuf,
    },
    /// The device cannot be opened.
    #[error("cannot open the block device {}", path.display())]
    Open {
        /// The device on the host.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A checkpoint has no part of a block device.
    #[error("the container {id} uses the block device {}, which is not part of a checkpoint", path.display())]
    Checkpoint {
        /// The container's id.
        id: String,
        /// The device on the host.
        path: PathBuf,
    },
    /// A restored container would have other devices than its checkpoint.
    #[error("a container that is restored cannot have the block device {}", path.display())]
    Restore {
        /// The device on the host.
        path: PathBuf,
    },
}

impl HasKind for HostDiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Source { .. } => ErrorKind::InvalidArgument,
            Self::NoDevice { .. } => ErrorKind::NotFound,
            Self::Examine { source, .. } | Self::Open { source, .. }
                if source.kind() == io::ErrorKind::NotFound =>
            {
                ErrorKind::NotFound
            }
            Self::InUse { .. } | Self::Checkpoint { .. } | Self::Restore { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Examine { .. } | Self::Open { .. } => ErrorKind::Internal,
        }
    }
}

/// A block device that is open.
#[derive(Debug, Clone)]
pub(in crate::pod) struct HostDiskFile {
    pub(in crate::pod) file: Arc<File>,
    /// The device on the host, for messages.
    pub(in crate::pod) path: PathBuf,
    pub(in crate::pod) major: u32,
    pub(in crate::pod) minor: u32,
    pub(in crate::pod) read_only: bool,
    /// The places of the mounts of its file system among the configuration's mounts.
    pub(in crate::pod) mounts: Vec<usize>,
}

/// Opens the devices, each once. Blocks.
///
/// # Errors
/// A device does not exist or is in use.
pub(super) fn open_all(requests: &[DiskRequest]) -> Result<Vec<HostDiskFile>, HostDiskError> {
    let mut wanted: Vec<(PathBuf, u32, u32, bool, Vec<usize>)> = Vec::new();
    for request in requests {
        let (path, major, minor, mount) = numbers(&request.source)?;
        match wanted.iter_mut().find(|disk| (disk.1, disk.2) == (major, minor)) {
            Some(disk) => {
                disk.3 &= request.read_only;
                disk.4.extend(mount);
            }
            None => wanted.push((path, major, minor, request.read_only, mount.into_iter().collect())),
        }
    }
    let open = |(name, major, minor, read_only, mounts)| {
        let (path, file) = open(name, (major, minor), read_only)?;
        Ok(HostDiskFile { file: Arc::new(file), path, major, minor, read_only, mounts })
    };
    wanted.into_iter().map(open).collect()
}

/// The path in messages, the numbers of the device, and the mount.
fn numbers(source: &DiskSource) -> Result<(PathBuf, u32, u32, Option<usize>), HostDiskError> {
    match source {
        DiskSource::Device { path, major, minor } => Ok((path.clone(), *major, *minor, None)),
        DiskSource::Mount { mount, source: path, destination } => {
            let (path, destination) = (path.clone(), destination.clone());
            match stat(&path) {
                Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice => {
                    Ok((path, major(found.st_rdev), minor(found.st_rdev), Some(*mount)))
                }
                Ok(_) => Err(HostDiskError::Source { path, destination }),
                Err(errno) => Err(HostDiskError::Examine { path, destination, source: errno.into() }),
            }
        }
    }
}

/// Opens a device by its numbers. The kernel knows its name, whatever is in the container's configuration.
fn open(named: PathBuf, numbers: (u32, u32), read_only: bool) -> Result<(PathBuf, File), HostDiskError> {
    let (major_number, minor_number) = numbers;
    let device = Path::new("/sys/dev/block").join(format!("{major_number}:{minor_number}")).join("uevent");
    let no_device = |source| HostDiskError::NoDevice {
        path: named.clone(),
        major: major_number,
        minor: minor_number,
        source,
    };
    let uevent = fs::read_to_string(device).map_err(no_device)?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| no_device(io::ErrorKind::NotFound.into()))?;
    let path = Path::new("/dev").join(name);
    let exclusive = if read_only { 0 } else { libc::O_EXCL };
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(exclusive).open(&path);
    let file = file.map_err(|source| match source.kind() {
        io::ErrorKind::ResourceBusy => HostDiskError::InUse { path: path.clone() },
        _ => HostDiskError::Open { path: path.clone(), source },
    })?;
    let found =
        fstat(&file).map_err(|errno| HostDiskError::Open { path: path.clone(), source: errno.into() })?;
    if (major(found.st_rdev), minor(found.st_rdev)) != numbers {
        return Err(no_device(io::ErrorKind::NotFound.into()));
    }
    Ok((path, file))
}

#[cfg(test)]
mod tests {
    use machinen_base::error::chain;

    use super::*;

    #[test]
    fn only_block_devices_are_disks() {
        let mount = |source: &str| DiskRequest {
            source: DiskSource::Mount { mount: 3, source: source.into(), destination: "/data".into() },
            read_only: true,
        };
        let device = DiskSource::Device { path: "/dev/x".into(), major: 4095, minor: 77 };
        for (request, words) in [
            (mount("/dev/null"), "/dev/null, the source of the mount /data, is no block device"),
            (
                mount("/dev/missing"),
                "cannot examine /dev/missing, the source of the mount /data: No such file",
            ),
            (DiskRequest { source: device, read_only: true }, "no block device 4095:77, which /dev/x is"),
        ] {
            let error = chain(&open_all(&[request]).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
