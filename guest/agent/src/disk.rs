//! Finds a disk that the host has attached, by its SCSI address.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_protocol::{api, disks::RootDisks};

use crate::{
    sys,
    uevent::{UeventError, Uevents},
};

/// A disk is readable some 20 ms after the host's `device_add`; one that is not there by this deadline was
/// never attached.
const DEADLINE: Duration = Duration::from_secs(5);

/// Writing `<channel> <target> <lun>` makes the kernel look at one address of the VM's only controller.
const SCAN: &str = "/sys/class/scsi_host/host0/scan";

/// Where the agent finds disks.
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
    /// A directory that replaces the file system on a disk, in a test.
    Directory(PathBuf),
}

/// SCSI address of a disk on the only controller's only bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScsiAddress {
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

impl From<&api::Disk> for ScsiAddress {
    fn from(disk: &api::Disk) -> Self {
        Self { target: disk.target, lun: disk.lun }
    }
}

impl DiskSource {
    /// Finds the disks of a container, and waits for disks that the guest's kernel has not seen yet.
    ///
    /// # Errors
    /// A disk is not there before the deadline.
    pub(crate) async fn find(&self, addresses: RootDisks<ScsiAddress>) -> Result<RootDisks<Disk>, DiskError> {
        match self {
            Self::Scsi => {
                let uevents = Uevents::subscribe().map_err(DiskError::Uevents)?;
                // The kernel starts to use a disk in the background: ask for all before waiting for the
                // first.
                match addresses.try_map(|address, _| Scanned::scan(address))? {
                    RootDisks::Overlay { base, writable } => {
                        let base = base.appears(&uevents).await?;
                        Ok(RootDisks::Overlay { base, writable: writable.appears(&uevents).await? })
                    }
                    RootDisks::ReadOnly(disk) => Ok(RootDisks::ReadOnly(disk.appears(&uevents).await?)),
                    RootDisks::Whole(disk) => Ok(RootDisks::Whole(disk.appears(&uevents).await?)),
                }
            }
            Self::Directory(dir) => addresses.try_map(|address, read_only| image(dir, address, read_only)),
        }
    }

    /// Finds one disk.
    ///
    /// # Errors
    /// A disk is not there before the deadline.
    pub(crate) async fn find_one(&self, address: ScsiAddress, read_only: bool) -> Result<Disk, DiskError> {
        let disks = if read_only { RootDisks::ReadOnly(address) } else { RootDisks::Whole(address) };
        Ok(self.find(disks).await?.into_own())
    }
}

/// An address that the kernel was asked to scan.
struct Scanned {
    address: ScsiAddress,
}

impl Scanned {
    fn scan(address: ScsiAddress) -> Result<Self, DiskError> {
        // The kernel scans no target by itself: finding 256 of them empty would delay the boot.
        fs::write(SCAN, format!("0 {} {}", address.target, address.lun)).map_err(DiskError::Scan)?;
        Ok(Self { address })
    }

    async fn appears(self, uevents: &Uevents) -> Result<Disk, DiskError> {
        let ScsiAddress { target, lun } = self.address;
        // sysfs shows a LUN as it was addressed; above 255 that includes the flag of the flat format (SAM-5,
        // 4.7).
        let shown = if lun > 255 { lun | 0x4000 } else { lun };
        let dir = PathBuf::from(format!("/sys/bus/scsi/devices/0:0:{target}:{shown}/block"));
        let device = uevents
            .find(DEADLINE, || block_device(&dir))
            .await
            .map_err(|source| DiskError::Missing { target, lun, source })?;
        Ok(Disk::Block { device, _loop_device: None })
    }
}

/// The disk appears in sysfs a moment before it can be opened, and its event comes after that.
fn block_device(dir: &Path) -> Option<PathBuf> {
    let name = fs::read_dir(dir).ok()?.next()?.ok()?.file_name();
    let device = Path::new("/dev").join(name);
    File::open(&device).is_ok().then_some(device)
}

fn image(dir: &Path, ScsiAddress { target, lun }: ScsiAddress, read_only: bool) -> Result<Disk, DiskError> {
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
