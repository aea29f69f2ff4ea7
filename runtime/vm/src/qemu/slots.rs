//! The disks that a template has already, so that the guest of a clone finds its first disks without a scan.
//!
//! ```text
//!   template   slot 0: no content, only read     slot 1: no content
//!   clone      slot 0: the base disk             slot 1: the writable disk
//! ```
//! A clone that is made before its disks are known gets them later: QEMU puts another file behind the device of a slot, which the
//! guest need not notice. What is empty when the first container has all of its disks is removed.
//!
//! The saved state of a VM has no content of its disks: QEMU takes it from the command line of each clone. The guest's kernel
//! keeps the size that it has found in the template, and uses what the file system on the disk takes of it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use machinen_base::{memfd, process::ChildLimits, space::DiskReserve};
use machinen_protocol::disks::TEMPLATE_DISKS;

use crate::{
    VmError,
    qemu::{
        argv::{SCSI, fd},
        hotplug::{DiskAddress, DiskBacking, DiskSpec, GuardedDisk, allow_to_write, fdset, node},
    },
};

/// Whether the guest can only read the disk of each slot.
const READ_ONLY: [bool; SLOTS] = [true, false];
/// The slots of a template.
pub(crate) const SLOTS: usize = TEMPLATE_DISKS as usize;
/// What the guest takes for the size of the disk in a slot, bytes: more than any disk has whose file system ext4 can be.
const SIZE: u64 = 15 << 40;
/// The unit of a disk's addresses, bytes.
const SECTOR: u64 = 512;

/// The disks with which a clone starts: one that is only read, and one that is written.
#[derive(Debug)]
pub struct SlotDisks {
    disks: [GuardedDisk; SLOTS],
    /// The disks are more than holes.
    has_content: bool,
}

impl SlotDisks {
    /// Where the guest has the disks.
    pub const ADDRESSES: [DiskAddress; SLOTS] =
        [DiskAddress { target: 0, lun: 0, known: true }, DiskAddress { target: 1, lun: 0, known: true }];

    /// Returns None if a disk can only be attached to a VM that runs, because it is no regular file, or too large.
    ///
    /// # Errors
    /// The file of a disk cannot be opened for QEMU.
    pub fn new(base: DiskSpec, writable: DiskSpec) -> Result<Option<Self>, VmError> {
        let disks = [base, writable];
        if !disks.iter().enumerate().all(|(slot, disk)| fits(slot, disk) && !disk.volatile) {
            return Ok(None);
        }
        let [base, writable] = disks;
        let disks = [GuardedDisk::new(base)?, GuardedDisk::new(writable)?];
        Ok(Some(Self { disks, has_content: true }))
    }

    /// Disks without content. They are files nevertheless: QEMU numbers its descriptors in the order in which it opens
    /// files, and the memory has the same number in a template and all of its clones.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn holes() -> Result<Self, VmError> {
        Self::holes_with([None, None])
    }

    /// As [`Self::holes`], but that the disks begin with the content of these files.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn holes_with(content: [Option<&File>; SLOTS]) -> Result<Self, VmError> {
        let hole = |read_only, content: Option<&File>| {
            let serial = "hole";
            let failed = |source| VmError::DiskFile { serial: serial.to_owned(), source };
            let file = memfd::sparse(SIZE).map_err(failed)?;
            if let Some(content) = content {
                memfd::copy_data(content, &File::from(file.try_clone().map_err(failed)?)).map_err(failed)?;
            }
            let source = DiskBacking::File(file);
            let (serial, reserve) = (serial.to_owned(), DiskReserve::default());
            GuardedDisk::new(DiskSpec { source, read_only, volatile: false, serial, reserve })
        };
        let ([first, second], [base, writable]) = (READ_ONLY, content);
        Ok(Self { disks: [hole(first, base)?, hole(second, writable)?], has_content: false })
    }

    /// What QEMU inherits, with the numbers.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn inherited(&self) -> io::Result<Vec<(OwnedFd, i32)>> {
        let files = self.disks.iter().filter_map(|disk| match &disk.disk.source {
            DiskBacking::File(file) => Some(file.as_fd().try_clone_to_owned()),
            DiskBacking::Nbd { .. } => None,
        });
        files.zip(fd::FIRST_SLOT..).map(|(file, number)| Ok((file?, number))).collect()
    }

    /// Lets QEMU write to the disks.
    ///
    /// # Errors
    /// The limit of QEMU cannot be raised.
    pub(crate) fn allow_to_write(&self, limits: &ChildLimits) -> Result<(), VmError> {
        if !self.has_content {
            return Ok(());
        }
        self.disks.iter().try_for_each(|disk| allow_to_write(limits, &disk.disk))
    }

    /// The disks, if they have content.
    pub(crate) fn into_content(self) -> Option<[GuardedDisk; SLOTS]> {
        self.has_content.then_some(self.disks)
    }
}

/// Whether the file of a disk can be in a slot.
pub(crate) fn fits(slot: usize, disk: &DiskSpec) -> bool {
    let has_size = |size: u64| (1..=SIZE).contains(&size) && size.is_multiple_of(SECTOR);
    READ_ONLY.get(slot) == Some(&disk.read_only) && disk.regular_size().is_some_and(has_size)
}

/// The number of a slot's disk.
pub(crate) fn number(slot: usize) -> u64 {
    slot as u64 + 1
}

/// QEMU's arguments for the slots of a template or clone.
pub(crate) fn args() -> Vec<String> {
    let mut args = Vec::new();
    for (slot, (read_only, file)) in READ_ONLY.into_iter().zip(fd::FIRST_SLOT..).enumerate() {
        let (node, set) = (node(number(slot)), fdset(number(slot)));
        let switch = if read_only { "on" } else { "off" };
        let block = format!(
            "driver=raw,node-name={node},read-only={switch},discard=unmap,file.driver=file,\
             file.filename=/dev/fdset/{set},file.read-only={switch},file.auto-read-only=off,file.locking=off,\
             file.discard=unmap"
        );
        // As for disks that are attached later, but for the serial, which the guest has read in the template.
        let device = format!(
            "scsi-hd,werror=report,rerror=report,id={node},bus={SCSI}.0,drive={node},channel=0,scsi-id={slot},lun=0,\
             serial={node},rotation_rate=1"
        );
        let values = [("-add-fd", format!("fd={file},set={set}")), ("-blockdev", block), ("-device", device)];
        args.extend(values.into_iter().flat_map(|(name, value)| [name.to_owned(), value]));
    }
    args
}

#[cfg(test)]
mod tests {
    use std::{fs::File, path::Path};

    use super::*;

    fn disk(path: &Path, read_only: bool) -> DiskSpec {
        let file = File::options().read(true).write(!read_only).open(path).unwrap();
        DiskSpec {
            source: DiskBacking::File(file.into()),
            read_only,
            volatile: false,
            serial: "x".into(),
            reserve: DiskReserve::default(),
        }
    }

    fn file_of(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn a_clone_inherits_as_many_files_as_its_template() {
        let file = file_of(1 << 20);
        let disks = SlotDisks::new(disk(file.path(), true), disk(file.path(), false)).unwrap().unwrap();
        let inherited = disks.inherited().unwrap();
        let numbers: Vec<i32> = inherited.into_iter().map(|(_, number)| number).collect();
        assert_eq!(numbers, [fd::FIRST_SLOT, fd::FIRST_SLOT + 1]);
        let holes = SlotDisks::holes().unwrap().inherited().unwrap();
        assert_eq!(holes.into_iter().map(|(_, number)| number).collect::<Vec<_>>(), numbers);
        insta::assert_snapshot!(args().join("\n"));
    }

    #[test]
    fn a_disk_that_does_not_fit_is_attached_later() {
        let file = file_of(1 << 20);
        let fits = |base, writable| SlotDisks::new(base, writable).unwrap().is_some();
        let (base, writable) = (disk(file.path(), true), disk(file.path(), false));
        assert!(!fits(writable, base));
        assert!(!fits(disk(Path::new("/dev/zero"), true), disk(file.path(), false)));
        let odd = file_of(SECTOR + 1);
        assert!(!fits(disk(file.path(), true), disk(odd.path(), false)));
    }
}
