//! Finds a disk that the host has attached, by its SCSI address.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use machinen_protocol::{
    api,
    disks::{RootDisks, TEMPLATE_DISKS},
};

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
    /// The VM's virtio-scsi controller. The devices of the disks that a template has are found in the template, by target.
    Scsi { of_template: OnceLock<Vec<PathBuf>> },
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
    /// The template had a disk there, and the host has put this one into its place.
    known: bool,
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
        Self { target: disk.target, lun: disk.lun, known: disk.known }
    }
}

impl DiskSource {
    /// Finds the disks of a container, and waits for disks that the guest's kernel has not seen yet.
    ///
    /// # Errors
    /// A disk is not there before the deadline.
    pub(crate) async fn find(&self, addresses: RootDisks<ScsiAddress>) -> Result<RootDisks<Disk>, DiskError> {
        match self {
            Self::Scsi { of_template } => {
                let found = addresses.try_map(|address, _| address.known_device(of_template).ok_or(()));
                if let Ok(devices) = found {
                    return Ok(devices.map(Disk::block));
                }
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
                .map(|devices| devices.map(Disk::block))
            }
            Self::Directory(dir) => addresses.try_map(|address, read_only| image(dir, address, read_only)),
        }
    }

    /// Finds the disks of a template, which its clones have replaced when they ask for them.
    ///
    /// # Errors
    /// A disk is not there before the deadline.
    pub(crate) async fn warm_up(&self) -> Result<(), DiskError> {
        let Self::Scsi { of_template } = self else { return Ok(()) };
        let uevents = Uevents::subscribe().map_err(DiskError::Uevents)?;
        let mut devices = Vec::new();
        for target in 0..TEMPLATE_DISKS {
            let scanned = Scanned::scan(ScsiAddress { target, lun: 0, known: false })?;
            devices.push(scanned.appears(&uevents).await?);
        }
        of_template.get_or_init(|| devices);
        Ok(())
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

impl ScsiAddress {
    /// The device of a disk that is in the place of one of the template's.
    fn known_device(self, of_template: &OnceLock<Vec<PathBuf>>) -> Option<PathBuf> {
        let number = usize::try_from(self.target).ok()?;
        (self.known && self.lun == 0).then(|| of_template.get()?.get(number).cloned())?
    }
}

impl Disk {
    fn block(device: PathBuf) -> Self {
        Self::Block { device, _loop_device: None }
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

    async fn appears(self, uevents: &Uevents) -> Result<PathBuf, DiskError> {
        let ScsiAddress { target, lun, .. } = self.address;
        // sysfs shows a LUN as it was addressed; above 255 that includes the flag of the flat format (SAM-5,
        // 4.7).
        let shown = if lun > 255 { lun | 0x4000 } else { lun };
        let dir = PathBuf::from(format!("/sys/bus/scsi/devices/0:0:{target}:{shown}/block"));
        let found = uevents.find(DEADLINE, || block_device(&dir)).await;
        found.map_err(|source| DiskError::Missing { target, lun, source })
    }
}

/// The disk appears in sysfs a moment before it can be opened, and its event comes after that.
fn block_device(dir: &Path) -> Option<PathBuf> {
    let name = fs::read_dir(dir).ok()?.next()?.ok()?.file_name();
    let device = Path::new("/dev").join(name);
    File::open(&device).is_ok().then_some(device)
}

fn image(
    dir: &Path,
    ScsiAddress { target, lun, .. }: ScsiAddress,
    read_only: bool,
) -> Result<Disk, DiskError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_in_the_place_of_a_templates_is_not_looked_for() {
        let of_template = OnceLock::from(vec!["/dev/a".into(), "/dev/b".into()]);
        let address = |target, known| ScsiAddress { target, lun: 0, known };
        let known = |address: ScsiAddress| address.known_device(&of_template);
        assert_eq!(known(address(1, true)), Some("/dev/b".into()));
        assert_eq!(known(address(1, false)), None);
        assert_eq!(known(address(2, true)), None);
        assert_eq!(known(ScsiAddress { lun: 1, ..address(1, true) }), None);
        assert_eq!(address(0, true).known_device(&OnceLock::new()), None);
        let disks = RootDisks::Overlay { base: address(0, true), writable: address(1, true) };
        let source = DiskSource::Scsi { of_template: of_template.clone() };
        let found = source.find(disks).await.unwrap().map(|disk| match disk {
            Disk::Block { device, .. } => device,
            Disk::Directory(path) => path,
        });
        assert_eq!(found, RootDisks::Overlay { base: "/dev/a".into(), writable: "/dev/b".into() });
    }
}
