//! The disks of a container that is being created: opened on the host, and attached to its VM.

use std::{fs::File, sync::Mutex};

use machinen_base::{error::chain, space::DiskReserve};
use machinen_protocol::{
    api::{self, CreateContainerRequest, InjectedFile, Rootfs, Stdio},
    disks::RootDisks,
};
use machinen_storage::{
    container_disk::PendingDisk,
    rootdisk::{Rootdisk, RootdiskCache, RootdiskKey, RootdiskProgress},
};
use machinen_vm::{DiskAddress, DiskBacking, DiskSpec, SlotDisks, Vm, VmError, agent};
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use tokio::task::spawn_blocking;

use super::CreatePlan;
use crate::{
    checkpoint::ImageDisk,
    pod::{
        PodError,
        copies::{self, OpenCopy},
        host_disks::HostDiskFile,
        layer,
        phases::PhaseTimes,
        restore,
    },
};

/// The disks of a container: those of its root file system, and the one with the checkpoint's images if the
/// container is restored.
#[derive(Debug)]
pub(in crate::pod) struct ContainerDisks<T, C = T> {
    pub(in crate::pod) root: RootDisks<T>,
    pub(in crate::pod) checkpoint: Option<C>,
    /// Block devices of the host that are attached.
    pub(in crate::pod) host: Vec<api::HostDisk>,
    /// Copies of directories of the host that are attached.
    pub(in crate::pod) copies: Vec<api::CopyMount>,
}

/// The disks of a container on the host.
pub(in crate::pod) type OpenDisks = ContainerDisks<File, ImageDisk>;

/// What is known of the disks of a container that is being created.
#[derive(Debug)]
pub(super) struct PendingDisks {
    pub(super) open: OpenDisks,
    /// The base disk, if there is one.
    pub(super) base: Option<RootdiskKey>,
    /// Removes a new writable disk, unless the container is created.
    pub(super) writable: PendingDisk,
    pub(super) copies: Vec<OpenCopy>,
}

impl PendingDisks {
    /// The disks with which a clone can start; None if they are not an overlay's, or do not fit a clone.
    ///
    /// # Errors
    /// A file cannot be opened for QEMU.
    pub(super) fn for_slots(&self, id: &str, plan: &CreatePlan) -> Result<Option<SlotDisks>, PodError> {
        let RootDisks::Overlay { base, writable } = &self.open.root else { return Ok(None) };
        let reserve = plan.config.rootdisk.reserve();
        let (base, writable) = (base_spec(base, id, reserve)?, writable_spec(writable, id, reserve)?);
        SlotDisks::new(base, writable)
            .map_err(|source| PodError::Vm { what: "open the disks of a clone", source })
    }
}

fn base_spec(file: &File, id: &str, reserve: DiskReserve) -> Result<DiskSpec, PodError> {
    file_spec(file, true, format!("base-{id}"), reserve)
}

fn writable_spec(file: &File, id: &str, reserve: DiskReserve) -> Result<DiskSpec, PodError> {
    file_spec(file, false, format!("rw-{id}"), reserve)
}

fn file_spec(
    file: &File,
    read_only: bool,
    serial: String,
    reserve: DiskReserve,
) -> Result<DiskSpec, PodError> {
    let source = DiskBacking::File(file.try_clone().map_err(PodError::Descriptor)?.into());
    Ok(DiskSpec { source, read_only, volatile: false, serial, reserve })
}

/// Opens the disks of the plan, all at once; a disk that is missing is made.
///
/// # Errors
/// A disk cannot be made or opened. A new writable disk is removed then.
pub(super) async fn open(plan: &CreatePlan, id: &str, phases: &PhaseTimes) -> Result<PendingDisks, PodError> {
    let (base, (own, writable), checkpoint, copies) = tokio::try_join!(
        phases.time("rootdisk", base_disk(plan, id)),
        phases.time("writable", layer::open_disk(&plan.rootfs, &plan.config)),
        restore::restore_disk(plan.restore.as_ref(), phases),
        phases.time("copies", copies::open(plan, id)),
    )?;
    let key = base.as_ref().map(|base| base.key);
    let root = root_disks(plan, base, own);
    let open = ContainerDisks { root, checkpoint, host: Vec::new(), copies: Vec::new() };
    Ok(PendingDisks { open, base: key, writable, copies })
}

/// Sorts the disks of a root file system. `base`: the result of [`base_disk`]; `own`: the disk that belongs to
/// the container alone.
pub(in crate::pod) fn root_disks(plan: &CreatePlan, base: Option<Rootdisk>, own: File) -> RootDisks<File> {
    match base {
        Some(base) => RootDisks::Overlay { base: base.file, writable: own },
        None if plan.rootfs.read_only() => RootDisks::ReadOnly(own),
        None => RootDisks::Whole(own),
    }
}

/// Returns None if the root file system is on a disk already.
pub(in crate::pod) async fn base_disk(plan: &CreatePlan, id: &str) -> Result<Option<Rootdisk>, PodError> {
    let Some(source) = plan.rootfs.source.clone() else { return Ok(None) };
    let (dir, options) = (plan.config.rootdisk.dir.clone(), plan.config.rootdisk.base_disks());
    let id = id.to_owned();
    let disk = plan.rootfs.disk.clone();
    let build = move || {
        let cache = RootdiskCache::open(&dir)?;
        if let Some(base) = disk.base_of_remaining_disk(&cache)? {
            return Ok(base);
        }
        cache.get_or_build(&source, &options, &mut |progress| match progress {
            RootdiskProgress::Hashed { .. } => tracing::debug!(id, "rootdisk: {progress}"),
            _ => tracing::info!(id, "rootdisk: {progress}"),
        })
    };
    spawn_blocking(build).await.map_err(PodError::Worker)?.map(Some).map_err(PodError::Rootdisk)
}

/// The disks of one container that a VM has attached.
#[derive(Debug)]
pub(in crate::pod) struct Attachments {
    vm: Vm,
    reserve: DiskReserve,
    /// The VM has started with the disks of the root file system.
    has_disks: bool,
    /// Includes the disks that were attached before another one failed.
    addresses: Mutex<Vec<DiskAddress>>,
}

impl Attachments {
    /// `reserve`: what the guest's writes leave free on the host.
    /// `has_disks`: the VM has started with the disks of the root file system.
    pub(in crate::pod) fn new(vm: Vm, reserve: DiskReserve, has_disks: bool) -> Self {
        let attached = if has_disks { SlotDisks::ADDRESSES.to_vec() } else { Vec::new() };
        Self { vm, reserve, has_disks, addresses: Mutex::new(attached) }
    }

    /// Attaches the disks while the guest starts, and waits for its agent.
    ///
    /// # Errors
    /// A disk is refused, or the guest does not become ready. Some disks may be attached.
    pub(in crate::pod) async fn attach(
        &self,
        id: &str,
        disks: &OpenDisks,
        host: &[HostDiskFile],
        copies: &[OpenCopy],
        phases: &PhaseTimes,
    ) -> Result<(ContainerDisks<DiskAddress>, agent::Client), PodError> {
        let base = async |disk| {
            let disk = base_spec(disk, id, self.reserve)?;
            let attached = self.attach_disk("attach the base disk", disk);
            phases.time("attach-base", attached).await
        };
        let writable = async |disk| {
            let disk = writable_spec(disk, id, self.reserve)?;
            let attached = self.attach_disk("attach the writable layer", disk);
            phases.time("attach-writable", attached).await
        };
        let root = async {
            Ok(match &disks.root {
                _ if self.has_disks => {
                    let [base, writable] = SlotDisks::ADDRESSES;
                    RootDisks::Overlay { base, writable }
                }
                RootDisks::Overlay { base: shared, writable: own } => {
                    let (base, writable) = tokio::try_join!(base(shared), writable(own))?;
                    RootDisks::Overlay { base, writable }
                }
                RootDisks::ReadOnly(disk) => RootDisks::ReadOnly(base(disk).await?),
                RootDisks::Whole(disk) => RootDisks::Whole(writable(disk).await?),
            })
        };
        let checkpoint = async {
            let Some(disk) = &disks.checkpoint else { return Ok(None) };
            let source = disk.serve().map_err(PodError::Descriptor)?;
            let (serial, reserve) = (format!("cp-{id}"), self.reserve);
            let disk = DiskSpec { source, read_only: true, volatile: false, serial, reserve };
            self.attach_disk("attach the checkpoint", disk).await.map(Some)
        };
        let ready = phases.time("vm-ready", async { self.vm.agent().await.map_err(PodError::Boot) });
        let (host, copies) = (self.attach_host(id, host), self.attach_copies(id, copies));
        let (root, checkpoint, host, copies, agent) =
            tokio::try_join!(root, checkpoint, host, copies, ready)?;
        let closed = self.vm.close_slots().await;
        closed.map_err(|source| PodError::Vm { what: "remove the template's disks", source })?;
        Ok((ContainerDisks { root, checkpoint, host, copies }, agent))
    }

    /// Attaches both disks of each copy.
    async fn attach_copies(&self, id: &str, copies: &[OpenCopy]) -> Result<Vec<api::CopyMount>, PodError> {
        let mut attached = Vec::new();
        for (number, OpenCopy { destination, base, writable }) in copies.iter().enumerate() {
            let base = file_spec(&base.file, true, format!("copy-{number}-{id}"), self.reserve)?;
            let writable = file_spec(writable, false, format!("copyrw-{number}-{id}"), self.reserve)?;
            let base = self.attach_disk("attach the disk of a copy mount", base).await?;
            let writable = self.attach_disk("attach the disk of a copy mount", writable).await?;
            let disks = RootDisks::Overlay { base, writable }.map(api::Disk::from);
            attached.push(api::CopyMount {
                destination: destination.display().to_string(),
                rootfs: MessageField::some(disks.into_message()),
                ..api::CopyMount::default()
            });
        }
        Ok(attached)
    }

    /// Attaches block devices of the host.
    async fn attach_host(&self, id: &str, disks: &[HostDiskFile]) -> Result<Vec<api::HostDisk>, PodError> {
        let mut attached = Vec::new();
        for HostDiskFile { file, major, minor, read_only, .. } in disks {
            let source = DiskBacking::File(file.try_clone().map_err(PodError::Descriptor)?.into());
            let (serial, reserve) = (format!("dev-{major}-{minor}-{id}"), DiskReserve::default());
            let disk = DiskSpec { source, read_only: *read_only, volatile: false, serial, reserve };
            let address = self.attach_disk("attach a block device of the host", disk).await?;
            attached.push(api::HostDisk {
                major: *major,
                minor: *minor,
                disk: MessageField::some(address.into()),
                read_only: *read_only,
                ..api::HostDisk::default()
            });
        }
        Ok(attached)
    }

    async fn attach_disk(&self, what: &'static str, disk: DiskSpec) -> Result<DiskAddress, PodError> {
        let address = self.vm.attach_disk(disk).await.map_err(|source| PodError::Vm { what, source })?;
        self.addresses.lock().expect("no panic while held").push(address);
        Ok(address)
    }

    /// Leaves it to the caller to detach a disk.
    pub(super) fn hand_over(&self, address: DiskAddress) {
        self.addresses.lock().expect("no panic while held").retain(|attached| *attached != address);
    }

    /// Detaches all disks, which the guest does not use any more. A disk that cannot be detached stays until
    /// the VM ends; that is logged.
    pub(in crate::pod) async fn detach(&self) {
        let addresses = std::mem::take(&mut *self.addresses.lock().expect("no panic while held"));
        for address in addresses {
            match self.vm.detach_disk(address).await {
                Ok(()) | Err(VmError::Exited(_)) => {}
                Err(error) => tracing::warn!("{}", chain(&error)),
            }
        }
    }
}

/// The request to the guest's agent for a container with these disks. `mapped`: the files of the base disk belong to users
/// of the container's user namespace.
///
/// # Errors
/// The configuration cannot be encoded.
pub(in crate::pod) fn request(
    id: &str,
    guest_spec: &Spec,
    disks: &ContainerDisks<DiskAddress>,
    mapped: bool,
    stdio: Stdio,
    files: Vec<InjectedFile>,
) -> Result<CreateContainerRequest, PodError> {
    let rootfs = Rootfs { mapped, ..disks.root.map(api::Disk::from).into_message() };
    Ok(CreateContainerRequest {
        container_id: id.to_owned(),
        oci_config: serde_json::to_vec(guest_spec).map_err(PodError::Encode)?,
        rootfs: MessageField::some(rootfs),
        stdio: MessageField::some(stdio),
        files,
        host_disks: disks.host.clone(),
        copies: disks.copies.clone(),
        ..Default::default()
    })
}
