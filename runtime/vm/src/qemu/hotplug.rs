//! Adds disks to the virtio-scsi controller of a running VM and removes them, by QMP.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use machinen_base::{process::ChildLimits, space::DiskReserve};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{SFlag, fstat},
};
use serde_json::json;
use tokio::sync::broadcast;

use crate::{
    VmError,
    qemu::{
        argv::{IMAGE_FDSET, SCSI},
        growth::{GrowingDisk, GrowthError, GrowthWatch},
        qmp::{Qmp, QmpError, QmpEvent},
        slots::{self, SLOTS, SlotDisks},
    },
};

/// Targets of one virtio-scsi controller; each disk is LUN 0 of a target of its own.
const TARGETS: u32 = 256;

/// QEMU removes a SCSI disk without asking the guest, so a healthy QEMU never reaches this deadline.
const DETACH_DEADLINE: Duration = Duration::from_secs(20);

/// Where the bytes of a disk are.
#[derive(Debug)]
pub enum DiskBacking {
    /// A raw image or block device. It must be open for reading only if the disk is read-only, else for
    /// reading and writing.
    File(OwnedFd),
    /// An NBD export of this name, which is served at the other end of this connected stream socket.
    Nbd {
        /// The stream socket, connected to a server of NBD.
        socket: OwnedFd,
        /// The name of the export.
        export: &'static str,
    },
}

/// A disk to attach.
#[derive(Debug)]
pub struct DiskSpec {
    /// Where the bytes of the disk are.
    pub source: DiskBacking,
    /// The guest cannot write to the disk.
    pub read_only: bool,
    /// The content is not needed after a crash of the host, so what the guest flushes need not reach stable
    /// storage.
    pub volatile: bool,
    /// Names the disk inside the guest and in messages; the guest sees at most 36 bytes of it.
    pub serial: String,
    /// What the guest's writes leave free of the host's file system that the disk's file is on: as long as there is less, the
    /// writes wait. Of no effect for a disk that the guest cannot write to, or that is no file.
    pub reserve: DiskReserve,
}

impl DiskSpec {
    /// The size of the file, bytes; None if the disk is no regular file, or its file is not open as the disk is to be used.
    pub(crate) fn regular_size(&self) -> Option<u64> {
        let DiskBacking::File(file) = &self.source else { return None };
        let status = fstat(file).ok()?;
        let is_regular = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let is_usable = is_regular && opened_read_only(file) == Some(self.read_only);
        is_usable.then(|| u64::try_from(status.st_size).unwrap_or_default())
    }

    /// Replaces the file by an open file description that only QEMU has. Returns the former one.
    ///
    /// A lock (flock(2)) and a position belong to the open file description. A QEMU that a guest has taken over could
    /// otherwise turn the shared lock of "in use" into an exclusive one, and stop all other users of the disk.
    fn with_own_file(self) -> Result<(Self, Option<OwnedFd>), VmError> {
        let DiskBacking::File(file) = self.source else { return Ok((self, None)) };
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let own = File::options().read(true).write(!self.read_only).open(path);
        let own = own.map_err(|source| VmError::DiskFile { serial: self.serial.clone(), source })?;
        Ok((Self { source: DiskBacking::File(own.into()), ..self }, Some(file)))
    }

    /// What has to be looked at while the disk `number` is attached, if it can grow. `file` is the disk's.
    fn growing(&self, number: u64, file: Option<&OwnedFd>) -> Result<Option<GrowingDisk>, VmError> {
        match file {
            Some(file) if !self.read_only && !self.reserve.is_nothing() => {
                let file = file.try_clone();
                let file =
                    file.map_err(|source| VmError::DiskFile { serial: self.serial.clone(), source })?;
                Ok(Some(GrowingDisk::new(node(number), file.into(), self.reserve)))
            }
            _ => Ok(None),
        }
    }

    /// The size of the file that QEMU writes to, bytes; 0 if QEMU writes to none.
    fn written_size(&self) -> io::Result<u64> {
        match &self.source {
            DiskBacking::File(file) if !self.read_only => {
                Ok(u64::try_from(fstat(file)?.st_size).unwrap_or_default())
            }
            DiskBacking::File(_) | DiskBacking::Nbd { .. } => Ok(0),
        }
    }
}

/// A disk whose file is an open file description that only QEMU has, and the caller's file, which may hold a lock.
#[derive(Debug)]
pub(crate) struct GuardedDisk {
    pub(crate) disk: DiskSpec,
    held: Option<OwnedFd>,
}

impl GuardedDisk {
    pub(crate) fn new(disk: DiskSpec) -> Result<Self, VmError> {
        disk.with_own_file().map(|(disk, held)| Self { disk, held })
    }
}

/// Where the guest finds a disk: `/sys/bus/scsi/devices/0:0:<target>:<lun>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskAddress {
    /// The SCSI target.
    pub target: u32,
    /// The logical unit of the target.
    pub lun: u32,
    /// The guest has the disk since its template, and need not look for it.
    pub known: bool,
}

impl From<DiskAddress> for machinen_protocol::api::Disk {
    fn from(DiskAddress { target, lun, known }: DiskAddress) -> Self {
        Self { target, lun, known, ..Self::default() }
    }
}

impl std::fmt::Display for DiskAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "target {} lun {}", self.target, self.lun)
    }
}

/// The disks of one VM; owned by its driver.
#[derive(Debug)]
pub(crate) struct AttachedDisks {
    qmp: Qmp,
    events: broadcast::Receiver<QmpEvent>,
    limits: ChildLimits,
    /// By target.
    attached: BTreeMap<u32, AttachedDisk>,
    /// The target that the next disk gets, if it is free. The guest may not have noticed yet that a disk was
    /// detached, so all other targets come first before a target is used again.
    next_target: u32,
    /// Number of the last disk; no number is used twice.
    last: u64,
    /// The template's slots that no disk is in.
    empty: Vec<usize>,
    /// Slots that disks leave can have others.
    slots_stay: bool,
    growth: GrowthWatch,
}

/// A disk that is attached to QEMU.
#[derive(Debug)]
struct AttachedDisk {
    number: u64,
    /// The slot of the template whose device the disk has.
    slot: Option<usize>,
    /// QEMU keeps the disk's descriptor until `remove-fd`.
    has_fdset: bool,
    /// Locks on the disk last as long as the disk is attached.
    _held: Option<OwnedFd>,
}

impl AttachedDisks {
    pub(crate) fn new(qmp: Qmp, events: broadcast::Receiver<QmpEvent>, limits: ChildLimits) -> Self {
        Self {
            qmp,
            events,
            limits,
            attached: BTreeMap::new(),
            next_target: 0,
            last: 0,
            empty: Vec::new(),
            slots_stay: false,
            growth: GrowthWatch::default(),
        }
    }

    /// Takes over the disks with which a clone has started. Slots without content are for the next disks.
    ///
    /// # Errors
    /// The file of a disk cannot be watched.
    pub(crate) fn take_over(&mut self, disks: SlotDisks) -> Result<(), VmError> {
        self.last = slots::number(SLOTS - 1);
        self.next_target = u32::try_from(SLOTS).unwrap_or_default();
        let Some(disks) = disks.into_content() else {
            (self.empty, self.slots_stay) = ((0..SLOTS).collect(), true);
            return Ok(());
        };
        for (slot, GuardedDisk { disk, held }) in disks.into_iter().enumerate() {
            let number = slots::number(slot);
            if let Some(growing) = disk.growing(number, held.as_ref())? {
                self.growth.add(growing);
            }
            self.attached
                .insert(slot as u32, AttachedDisk { number, slot: None, has_fdset: true, _held: held });
        }
        Ok(())
    }

    /// Removes the template's slots that are empty, and those that will be.
    ///
    /// # Errors
    /// QEMU does not remove a slot.
    pub(crate) async fn close_slots(&mut self) -> Result<(), VmError> {
        self.slots_stay = false;
        while let Some(slot) = self.empty.first().copied() {
            let removed = self.unplug(slots::number(slot), true).await;
            removed.map_err(|source| VmError::Detach { address: SlotDisks::ADDRESSES[slot], source })?;
            self.empty.remove(0);
        }
        Ok(())
    }

    pub(crate) async fn attach(&mut self, disk: DiskSpec) -> Result<DiskAddress, VmError> {
        let serial = disk.serial.clone();
        let refused = |reason| VmError::Disk { serial: serial.clone(), reason };
        let has_fdset = matches!(disk.source, DiskBacking::File(_));
        if let DiskBacking::File(file) = &disk.source
            && opened_read_only(file) != Some(disk.read_only)
        {
            return Err(refused("the access mode of its file is not that of the disk"));
        }
        let slot = self.empty.iter().copied().find(|slot| slots::fits(*slot, &disk));
        let target = (0..TARGETS)
            .map(|offset| (self.next_target + offset) % TARGETS)
            .find(|target| !self.attached.contains_key(target))
            .ok_or_else(|| refused("every target of the controller is in use"))?;
        allow_to_write(&self.limits, &disk)?;
        let (disk, held) = disk.with_own_file()?;
        self.last += 1;
        let number = self.last;
        let growing = disk.growing(number, held.as_ref())?;
        let address =
            slot.map_or(DiskAddress { target, lun: 0, known: false }, |slot| SlotDisks::ADDRESSES[slot]);
        match self.plug(number, slot, address, disk).await {
            Ok(()) => {
                if let Some(growing) = growing {
                    self.growth.add(growing);
                }
                self.attached.insert(address.target, AttachedDisk { number, slot, has_fdset, _held: held });
                match slot {
                    Some(slot) => self.empty.retain(|empty| *empty != slot),
                    None => self.next_target = target + 1,
                }
                Ok(address)
            }
            Err((undo, source)) => {
                self.unwind(number, undo).await;
                Err(VmError::Attach { serial, source })
            }
        }
    }

    /// A failure includes what the caller has to undo.
    async fn plug(
        &self,
        number: u64,
        slot: Option<usize>,
        address: DiskAddress,
        disk: DiskSpec,
    ) -> Result<(), (PlugUndo, QmpError)> {
        let DiskSpec { source, read_only, volatile, serial, reserve: _ } = disk;
        let serial = short_serial(&serial);
        let node = node(number);
        let (undo, storage) = match source {
            DiskBacking::File(file) => {
                let (fdset, driver) = (fdset(number), driver(&file));
                let handed = self.qmp.execute_with_fd("add-fd", json!({ "fdset-id": fdset }), file).await;
                handed.map_err(|error| (PlugUndo::Nothing, error))?;
                // Images are shared between VMs. Their owners lock them, not QEMU.
                let storage = json!({
                    "driver": driver, "filename": format!("/dev/fdset/{fdset}"), "read-only": read_only,
                    "auto-read-only": false, "locking": "off", "discard": "unmap",
                });
                (PlugUndo::Fdset, storage)
            }
            DiskBacking::Nbd { socket, export } => {
                // QEMU forgets the name as soon as the descriptor is used.
                let handed = self.qmp.execute_with_fd("getfd", json!({ "fdname": node }), socket).await;
                handed.map_err(|error| (PlugUndo::Nothing, error))?;
                let server = json!({ "type": "fd", "str": node });
                let storage = json!({
                    "driver": "nbd", "server": server, "export": export, "read-only": read_only,
                });
                (PlugUndo::Socket, storage)
            }
        };
        let block = json!({
            "node-name": node, "driver": "raw", "read-only": read_only, "discard": "unmap",
            "cache": { "no-flush": volatile }, "file": storage,
        });
        self.qmp.execute("blockdev-add", block).await.map_err(|error| (undo, error))?;
        if let Some(slot) = slot {
            return self.put(slot, number).await.map_err(|error| (undo.and_block(), error));
        }
        // report: if the host has no space left, the guest gets an I/O error, instead of QEMU stopping the
        // VM.
        let device = json!({
            "driver": "scsi-hd", "werror": "report", "rerror": "report", "id": node, "bus": format!("{SCSI}.0"), "drive": node,
            "channel": 0, "scsi-id": address.target, "lun": address.lun, "serial": serial, "rotation_rate": 1,
        });
        self.qmp.execute("device_add", device).await.map_err(|error| (undo.and_block(), error))?;
        Ok(())
    }

    /// Puts the block device `number` behind the device of a slot.
    async fn put(&self, slot: usize, number: u64) -> Result<(), QmpError> {
        let device = format!("/machine/peripheral/{}", node(slots::number(slot)));
        let drive = json!({ "path": device, "property": "drive", "value": node(number) });
        self.qmp.execute("qom-set", drive).await.map(drop)
    }

    pub(crate) async fn detach(&mut self, address: DiskAddress) -> Result<(), VmError> {
        let attached = match self.attached.get(&address.target) {
            Some(attached) if address.lun == 0 => attached,
            _ => return Err(VmError::NoDisk(address)),
        };
        let (number, slot, has_fdset) = (attached.number, attached.slot, attached.has_fdset);
        let removed = match slot {
            Some(slot) => self.take_out(slot, number).await,
            None => self.unplug(number, has_fdset).await,
        };
        removed.map_err(|source| VmError::Detach { address, source })?;
        self.attached.remove(&address.target);
        self.empty.extend(slot.filter(|_| self.slots_stay));
        self.growth.remove(&node(number));
        Ok(())
    }

    /// Waits until the disks' file systems have to be looked at.
    pub(crate) async fn until_look(&self) {
        self.growth.until_look().await;
    }

    /// Has the guest's writes wait as long as a disk's file system has less free space than it has to keep.
    ///
    /// # Errors
    /// A disk grows although its writes have to wait.
    pub(crate) async fn look(&mut self) -> Result<(), GrowthError> {
        self.growth.look(&self.qmp).await
    }

    /// Takes the disk `number` out of a slot, which becomes empty or is removed as well.
    async fn take_out(&self, slot: usize, number: u64) -> Result<(), QmpError> {
        let hole = slots::number(slot);
        self.put(slot, hole).await?;
        self.remove_block(number, true).await?;
        if self.slots_stay { Ok(()) } else { self.unplug(hole, true).await }
    }

    async fn unplug(&self, number: u64, has_fdset: bool) -> Result<(), QmpError> {
        let node = node(number);
        let mut events = self.events.resubscribe();
        self.qmp.execute("device_del", json!({ "id": node })).await?;
        let gone = QmpEvent::DeviceDeleted(node.clone());
        let deleted = async {
            loop {
                match events.recv().await {
                    Ok(event) if event == gone => return Ok(()),
                    // If another event was lost, QEMU refuses the next step.
                    Err(broadcast::error::RecvError::Lagged(_)) => return Ok(()),
                    Err(broadcast::error::RecvError::Closed) => return Err(QmpError::Closed),
                    Ok(_) => {}
                }
            }
        };
        match tokio::time::timeout(DETACH_DEADLINE, deleted).await {
            Ok(result) => result?,
            Err(_) => return Err(QmpError::Deadline { command: "device_del" }),
        }
        self.remove_block(number, has_fdset).await
    }

    async fn remove_block(&self, number: u64, has_fdset: bool) -> Result<(), QmpError> {
        self.qmp.execute("blockdev-del", json!({ "node-name": node(number) })).await?;
        if has_fdset {
            self.qmp.execute("remove-fd", json!({ "fdset-id": fdset(number) })).await?;
        }
        Ok(())
    }

    /// What cannot be undone stays until the VM ends, under a number that is not used again.
    async fn unwind(&self, number: u64, undo: PlugUndo) {
        let block = ("blockdev-del", json!({ "node-name": node(number) }));
        let fdset = ("remove-fd", json!({ "fdset-id": fdset(number) }));
        let steps = match undo {
            PlugUndo::Nothing => vec![],
            PlugUndo::Fdset => vec![fdset],
            PlugUndo::FdsetAndBlock => vec![block, fdset],
            PlugUndo::Socket => vec![("closefd", json!({ "fdname": node(number) }))],
            PlugUndo::Block => vec![block],
        };
        for (command, arguments) in steps {
            if let Err(error) = self.qmp.execute(command, arguments).await {
                tracing::warn!("cannot undo the failed attachment of a disk: {error}");
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum PlugUndo {
    Nothing,
    Fdset,
    FdsetAndBlock,
    Socket,
    /// QEMU closes the socket when the block device is removed.
    Block,
}

impl PlugUndo {
    fn and_block(self) -> Self {
        match self {
            Self::Fdset | Self::FdsetAndBlock => Self::FdsetAndBlock,
            Self::Nothing | Self::Socket | Self::Block => Self::Block,
        }
    }
}

/// Lets QEMU make a file as large as the disk, if QEMU writes to a file. Where limits cannot be raised, QEMU
/// was started with one for the largest disk.
pub(crate) fn allow_to_write(limits: &ChildLimits, disk: &DiskSpec) -> Result<(), VmError> {
    if !ChildLimits::can_be_raised() {
        return Ok(());
    }
    let serial = || disk.serial.clone();
    let size = disk.written_size().map_err(|source| VmError::DiskFile { serial: serial(), source })?;
    limits.allow_file_size(size).map_err(|source| VmError::DiskLimit { serial: serial(), source })
}

/// The name of a disk's block device in QEMU, and of the device that the guest sees.
pub(crate) fn node(number: u64) -> String {
    format!("disk-{number}")
}

/// QEMU's driver for a file or a block device.
fn driver(file: &OwnedFd) -> &'static str {
    let is_block = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFBLK;
    match fstat(file) {
        Ok(found) if is_block(found.st_mode) => "host_device",
        _ => "file",
    }
}

pub(crate) fn fdset(number: u64) -> u64 {
    IMAGE_FDSET + number
}

/// None if the file is open for writing only.
fn opened_read_only(file: &OwnedFd) -> Option<bool> {
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).ok()?);
    match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => Some(true),
        OFlag::O_RDWR => Some(false),
        _ => None,
    }
}

/// The part of a serial number that QEMU takes. The guest finds disks by their addresses, so the part need not be unique. QEMU 10
/// refuses more than 20 letters, because the number also becomes the disk's identifier, and QEMU 7 cuts it off.
fn short_serial(serial: &str) -> &str {
    const MOST: usize = 20;
    let ends = serial.char_indices().map(|(at, letter)| at + letter.len_utf8());
    &serial[..ends.take_while(|&end| end <= MOST).last().unwrap_or(0)]
}

#[cfg(test)]
mod tests;
