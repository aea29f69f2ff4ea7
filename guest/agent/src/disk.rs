//! Finding a disk that the host has attached, by its SCSI address.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_protocol::api;

use crate::{
    sys,
    uevent::{UeventError, Uevents},
};

/// From the host's `device_add` to a readable disk takes some 20 ms; a disk that is not there by then was
/// never attached.
const DEADLINE: Duration = Duration::from_secs(5);

/// Makes the kernel look at one address of the VM's only controller: `<channel> <target> <lun>`.
const SCAN: &str = "/sys/class/scsi_host/host0/scan";

/// Where disks come from.
#[derive(Debug, Clone)]
pub(crate) enum DiskSource {
    /// The VM's virtio-scsi controller.
    Scsi,
    /// Images and directories named `<target>-<lun>`, in a test.
    Directory(PathBuf),
}

/// A disk that was found.
#[derive(Debug)]
pub(crate) enum Disk {
    Block {
        device: PathBuf,
        /// Keeps a loop device until it is mounted.
        _loop_device: Option<OwnedFd>,
    },
    /// A directory that stands for the file system on the disk.
    Directory(PathBuf),
}

/// SCSI address of a disk on the only controller's only bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    target: u32,
    lun: u32,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("no disk at SCSI target {target} lun {lun}")]
    Missing { target: u32, lun: u32, source: UeventError },
    #[error("no disk image {path}")]
    MissingImage { path: PathBuf, source: io::Error },
    #[error("cannot make a loop device of {path}")]
    Loop { path: PathBuf, source: io::Error },
    #[error("cannot make the kernel look for a disk")]
    Scan(#[source] io::Error),
    #[error(transparent)]
    Uevents(UeventError),
}

/// What a root file system is made of.
#[derive(Debug)]
pub(crate) enum Layers<T> {
    /// What many containers share, and what one of them writes.
    Overlay { base: T, writable: T },
    /// One disk, for reading.
    ReadOnly(T),
    /// One disk, for reading and writing.
    Whole(T),
}

impl<T> Layers<T> {
    /// None for no disk at all.
    pub(crate) fn of(base: Option<T>, writable: Option<T>) -> Option<Self> {
        match (base, writable) {
            (Some(base), Some(writable)) => Some(Self::Overlay { base, writable }),
            (Some(base), None) => Some(Self::ReadOnly(base)),
            (None, Some(writable)) => Some(Self::Whole(writable)),
            (None, None) => None,
        }
    }

    /// Does the same with each, which is told whether it is only read.
    fn map<U, E>(self, mut with: impl FnMut(T, bool) -> Result<U, E>) -> Result<Layers<U>, E> {
        Ok(match self {
            Self::Overlay { base, writable } => {
                Layers::Overlay { base: with(base, true)?, writable: with(writable, false)? }
            }
            Self::ReadOnly(disk) => Layers::ReadOnly(with(disk, true)?),
            Self::Whole(disk) => Layers::Whole(with(disk, false)?),
        })
    }
}

impl From<&api::Disk> for Address {
    fn from(disk: &api::Disk) -> Self {
        Self { target: disk.target, lun: disk.lun }
    }
}

impl DiskSource {
    /// Finds the disks of a container, waiting for them if the guest's kernel has not seen them yet.
    ///
    /// # Errors
    /// Not there before the deadline.
    pub(crate) async fn find(&self, addresses: Layers<Address>) -> Result<Layers<Disk>, DiskError> {
        match self {
            Self::Scsi => {
                let uevents = Uevents::subscribe().map_err(DiskError::Uevents)?;
                // All before any is waited for: the kernel takes a disk into use in the background.
                match addresses.map(|address, _| Scanned::scan(address))? {
                    Layers::Overlay { base, writable } => {
                        let base = base.appears(&uevents).await?;
                        Ok(Layers::Overlay { base, writable: writable.appears(&uevents).await? })
                    }
                    Layers::ReadOnly(disk) => Ok(Layers::ReadOnly(disk.appears(&uevents).await?)),
                    Layers::Whole(disk) => Ok(Layers::Whole(disk.appears(&uevents).await?)),
                }
            }
            Self::Directory(dir) => addresses.map(|address, read_only| image(dir, address, read_only)),
        }
    }

    /// Finds one disk.
    ///
    /// # Errors
    /// Not there before the deadline.
    pub(crate) async fn find_one(&self, address: Address, read_only: bool) -> Result<Disk, DiskError> {
        let layers = if read_only { Layers::ReadOnly(address) } else { Layers::Whole(address) };
        let (Layers::ReadOnly(disk) | Layers::Whole(disk) | Layers::Overlay { writable: disk, .. }) =
            self.find(layers).await?;
        Ok(disk)
    }
}

/// An address that the kernel has been told to look at.
struct Scanned {
    address: Address,
}

impl Scanned {
    fn scan(address: Address) -> Result<Self, DiskError> {
        // The kernel looks at no target by itself: finding 256 of them empty would hold up the boot.
        fs::write(SCAN, format!("0 {} {}", address.target, address.lun)).map_err(DiskError::Scan)?;
        Ok(Self { address })
    }

    async fn appears(self, uevents: &Uevents) -> Result<Disk, DiskError> {
        let Address { target, lun } = self.address;
        // The kernel shows a LUN as it was addressed, and above 255 that is with the flat format's flag (SAM-5, 4.7).
        let shown = if lun > 255 { lun | 0x4000 } else { lun };
        let dir = PathBuf::from(format!("/sys/bus/scsi/devices/0:0:{target}:{shown}/block"));
        let device = uevents
            .find(DEADLINE, || block_device(&dir))
            .await
            .map_err(|source| DiskError::Missing { target, lun, source })?;
        Ok(Disk::Block { device, _loop_device: None })
    }
}

/// The disk is in sysfs a moment before it can be opened; its event comes after that moment.
fn block_device(dir: &Path) -> Option<PathBuf> {
    let name = fs::read_dir(dir).ok()?.next()?.ok()?.file_name();
    let device = Path::new("/dev").join(name);
    File::open(&device).is_ok().then_some(device)
}

fn image(dir: &Path, Address { target, lun }: Address, read_only: bool) -> Result<Disk, DiskError> {
    let path = dir.join(format!("{target}-{lun}"));
    let open = File::options().read(true).write(!read_only && !path.is_dir()).open(&path);
    let file = open.map_err(|source| DiskError::MissingImage { path: path.clone(), source })?;
    if path.is_dir() {
        return Ok(Disk::Directory(path));
    }
    let (number, device) =
        sys::attach_loop(file.as_fd(), read_only).map_err(|source| DiskError::Loop { path, source })?;
    Ok(Disk::Block { device: format!("/dev/loop{number}").into(), _loop_device: Some(device) })
}
