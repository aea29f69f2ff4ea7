//! Creates a container: from a bundle to an init that waits in the guest.
//!
//! Steps that do not depend on each other run concurrently, and the guest boots meanwhile. If a step fails,
//! the results of the earlier ones are removed. Only the base disk stays, since it is in a cache.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_protocol::api::{CreateContainerRequest, Disk, InjectedFile, Rootfs, Stdio};
use machinen_storage::rootdisk::{BuildOptions, Rootdisk, RootdiskCache, RootdiskProgress};
use machinen_vm::{DiskAddress, DiskBacking, DiskSpec, Vm, VmError, agent, assets::Assets};
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use tokio::{sync::watch, task::spawn_blocking};

use super::{
    Container, ContainerSlot, Pod, PodError, PodEvent,
    anchor::Anchor,
    checkpoint::{self, RestorePlan},
    container::ContainerStorage,
    layer::{self, WritableLayer},
    phases::PhaseTimes,
    provision::VmOrigin,
    rootfs::{self, RootfsMount},
    stdio::{HostStdio, StdioNames},
    streams::{self, Outputs, ProcessStreams},
};
use crate::{
    checkpoint::ImageDisk,
    config::{self, Config, annotations},
    spec::{
        bundle,
        guest::{self, GuestSpec, Injected, MAX_INJECTED},
    },
    view::ViewGuest,
};

/// A request to create a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateRequest {
    /// Unique in the pod.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// The mounts of the root file system that the caller asks for; if empty, `root.path` of the
    /// configuration is used.
    pub rootfs: Vec<RootfsMount>,
    /// Where the init's standard streams lead.
    pub stdio: StdioNames,
    /// Directory of the checkpoint to restore the container from, instead of executing its command. It may be
    /// removed once the container has been created.
    pub checkpoint: Option<PathBuf>,
}

/// Everything that is decided about a container before anything is changed on the host.
#[derive(Debug, Clone)]
pub(super) struct CreatePlan {
    /// With the annotations applied.
    pub(super) config: Config,
    pub(super) annotations: HashMap<String, String>,
    pub(super) assets: Assets,
    pub(super) guest: GuestSpec,
    pub(super) rootfs: rootfs::RootfsPlan,
    pub(super) restore: Option<RestorePlan>,
}

/// The disks of a container: the base disk with its image and the writable disk with its changes, or only one
/// of them that holds everything.
#[derive(Debug)]
pub(super) struct ContainerDisks<T, C = T> {
    pub(super) base: Option<T>,
    pub(super) writable: Option<T>,
    /// The disk with the checkpoint's images, if the container is restored.
    pub(super) checkpoint: Option<C>,
}

impl Pod {
    /// Creates a container; its init waits in the guest when this returns. Returns the pid of its anchor.
    ///
    /// # Errors
    /// The bundle, the root file system or this host does not allow it. Nothing is left behind.
    pub async fn create(&self, create: CreateRequest) -> Result<u32, PodError> {
        let id = create.id.clone();
        match self.containers().entry(id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => return Err(PodError::Exists { id }),
            std::collections::hash_map::Entry::Vacant(vacant) => vacant.insert(ContainerSlot::Creating),
        };
        // Runs in a task of its own, so that a caller that goes away does not leave a half-made container.
        let pod = self.clone();
        let task = tokio::spawn(async move {
            let result = pod.create_reserved(create).await;
            if result.is_err() {
                pod.unwind(&id).await;
            }
            result
        });
        task.await.map_err(PodError::Worker)?
    }

    async fn create_reserved(&self, create: CreateRequest) -> Result<u32, PodError> {
        let phases = PhaseTimes::default();
        let request = Box::new(create.clone());
        let all = phases.time("create", self.create_timed(create, &phases)).await;
        let (container, watched, origin) = all?;
        let (id, pid) = (container.id.clone(), container.pid);
        self.containers().insert(id.clone(), ContainerSlot::Ready(Arc::clone(&container)));
        self.emit(PodEvent::Created { pid, create: request });
        tracing::info!(id, pid, %origin, phases = %phases, "container created");
        let ContainerWatch { agent, vm, outputs } = watched;
        tokio::spawn(self.clone().watch(container, agent, vm, outputs));
        Ok(pid)
    }

    async fn create_timed(
        &self,
        create: CreateRequest,
        phases: &PhaseTimes,
    ) -> Result<(Arc<Container>, ContainerWatch, VmOrigin), PodError> {
        let plan = self.plan(&create)?;
        let mut host_stdio = HostStdio::open(&create.stdio, &self.owner(&create.id))?;
        let injected = read_injected(&plan.guest.injected)?;
        let (launched, mut vm) = watch::channel(None);
        let launch = async {
            let provisioned = phases.time("vm-launch", self.provision(&plan)).await?;
            // A clone that ends early is not an error: another VM is booted instead once the disks are there.
            launched.send_replace(Some(provisioned.vm.clone()).filter(|_| !provisioned.origin.is_clone()));
            Ok(provisioned)
        };
        let disks = async {
            tokio::try_join!(
                phases.time("rootdisk", base_disk(&plan, &create.id)),
                phases.time("writable", layer::open_disk(&plan.rootfs, &plan.config)),
                checkpoint::restore_disk(plan.restore.as_ref(), phases),
            )
        };
        // Converting an image can take long, so the end of the VM is reported without waiting for it.
        let disks = async {
            tokio::select! { disks = disks => disks, error = vm_end(&mut vm) => Err(error) }
        };
        let stdio = async { host_stdio.ready().await.map_err(PodError::from) };
        let cgroup = phases.time("cgroup", self.enter_cgroup(&plan, &create.bundle));
        let (provisioned, (base, mut writable, checkpoint), (), ()) =
            tokio::try_join!(launch, disks, stdio, cgroup)?;
        let key = base.as_ref().map(|base| base.key);
        let overlaid = key.filter(|_| plan.rootfs.is_overlaid());
        if let Some(restore) = &plan.restore {
            restore.check_rootfs(overlaid)?;
        }
        let mut files =
            ContainerDisks { base: base.map(|base| base.file), writable: writable.file.take(), checkpoint };
        if plan.rootfs.read_only {
            files.base = files.writable.take();
        }
        // From here on the guest proceeds on its own, so work on the host does not delay the start.
        let mut anchor = Anchor::spawn(&create.id, plan.guest.netns.as_deref())?;
        let (provisioned, (disks, agent)) =
            match attach_disks(&provisioned.vm, &create.id, &files, phases).await {
                Err(error) if provisioned.origin.is_clone() => {
                    let provisioned = self.boot_instead(&plan, provisioned, &error).await?;
                    let attached = attach_disks(&provisioned.vm, &create.id, &files, phases).await?;
                    (provisioned, attached)
                }
                attached => (provisioned, attached?),
            };
        let vm = provisioned.vm.clone();
        let _starting = self.shared.starting.acquire().await.expect("never closed");
        let (stdio, streams) = phases.time("streams", streams::connect(&vm, host_stdio)).await?;
        let guest_spec = plan.guest.for_vm(self.vm_vcpus());
        let mut request = request(&create.id, &guest_spec, &disks, stdio, injected)?;
        if let Some(restore) = &plan.restore {
            request.checkpoint = MessageField::some(restore.request(
                disks.checkpoint,
                plan.config.restore,
                &guest_spec,
                self.vm_vcpus(),
            ));
        }
        let created =
            phases.time("guest-create", agent.create_container(request)).await.map_err(|source| {
                match (&plan.restore, &files.checkpoint) {
                    (Some(restore), Some(disk)) => restore.refused(disk, source),
                    _ => PodError::guest("create", &create.id, source),
                }
            })?;
        phases.record_guest(&created);
        phases.time("limits", self.limit_on_host(&create.id, &plan, provisioned.origin)).await?;
        // The anchor has long entered its root by now; its pid must not be passed to clients before.
        phases.time("anchor", anchor.wait_for_root()).await?;
        let layer = WritableLayer::new(&plan.rootfs, &plan.config, key, writable.keep());
        let storage = ContainerStorage {
            layer,
            base: overlaid,
            checkpoint: disks
                .checkpoint
                .zip(files.checkpoint)
                .map(|(address, disk)| checkpoint::RestoreDisk { address, disk }),
            checkpoint_config: plan.config.checkpoint,
            rootfs: create.rootfs.clone(),
        };
        let (container, watched) = self.assemble(create, anchor, agent, vm, streams, storage);
        Ok((container, watched, provisioned.origin))
    }

    /// Makes all checks that change nothing on the host or in the guest.
    pub(super) fn plan(&self, create: &CreateRequest) -> Result<CreatePlan, PodError> {
        let spec = bundle::load(&create.bundle)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let config = annotations::apply(&self.shared.config, &annotations)?;
        let rootfs = rootfs::plan(&create.rootfs, &spec, &create.bundle)?;
        let guest = guest::reduce(spec, &create.id)?;
        let assets = Assets::find(&config.assets.dir)?;
        let restore = create.checkpoint.as_ref().map(|dir| RestorePlan::read(&create.id, dir)).transpose()?;
        Ok(CreatePlan { config, annotations, assets, guest, rootfs, restore })
    }

    fn assemble(
        &self,
        create: CreateRequest,
        anchor: Anchor,
        agent: agent::Client,
        vm: Vm,
        mut streams: ProcessStreams,
        storage: ContainerStorage,
    ) -> (Arc<Container>, ContainerWatch) {
        let stdin = streams.take_input(&agent, &create.id, "");
        anchor.attach(ViewGuest {
            vm: vm.clone(),
            agent: agent.clone(),
            container: create.id.clone(),
            unclaimed: Arc::clone(&self.shared.starting),
        });
        let container = Container::new(create.id, create.bundle, create.stdio, anchor, vm.clone(), storage);
        container.init.connect_stdin(stdin);
        let outputs = streams.outputs;
        (Arc::new(container), ContainerWatch { agent, vm, outputs })
    }

    /// Undoes what a failed create has left: the id, and the VM if no other container uses it.
    async fn unwind(&self, id: &str) {
        let mut slot = self.shared.vm.lock().await;
        let last = {
            let mut containers = self.containers();
            containers.remove(id);
            containers.is_empty()
        };
        if last && let Some(vm) = slot.take() {
            vm.kill().await;
        }
        self.shared.cgroup.release(id, || self.is_empty()).await;
    }
}

/// Attaches the disks while the guest starts, and waits for its agent.
pub(super) async fn attach_disks(
    vm: &Vm,
    id: &str,
    files: &ContainerDisks<File, ImageDisk>,
    phases: &PhaseTimes,
) -> Result<(ContainerDisks<DiskAddress>, agent::Client), PodError> {
    let attach = async |what, source, read_only, name: &str| {
        let disk = DiskSpec { source, read_only, volatile: false, serial: format!("{name}-{id}") };
        vm.attach_disk(disk).await.map(Some).map_err(|source| PodError::Vm { what, source })
    };
    let attach_file = async |what, file: &Option<File>, read_only, name| {
        let Some(file) = file else { return Ok(None) };
        let file = file.try_clone().map_err(PodError::Descriptor)?;
        attach(what, DiskBacking::File(file.into()), read_only, name).await
    };
    let attach_checkpoint = async {
        let Some(disk) = &files.checkpoint else { return Ok(None) };
        let source = disk.serve().map_err(PodError::Descriptor)?;
        attach("attach the checkpoint", source, true, "cp").await
    };
    let (base, writable, checkpoint, agent) = tokio::try_join!(
        phases.time("attach-base", attach_file("attach the base disk", &files.base, true, "base")),
        phases
            .time("attach-writable", attach_file("attach the writable layer", &files.writable, false, "rw")),
        attach_checkpoint,
        phases.time("vm-ready", async { vm.agent().await.map_err(PodError::Boot) }),
    )?;
    Ok((ContainerDisks { base, writable, checkpoint }, agent))
}

/// What the watcher of a container needs.
struct ContainerWatch {
    agent: agent::Client,
    vm: Vm,
    outputs: Outputs,
}

/// Resolves when the VM has ended. Stays pending while there is no VM.
async fn vm_end(launched: &mut watch::Receiver<Option<Vm>>) -> PodError {
    let vm = launched.wait_for(Option::is_some).await.ok().and_then(|vm| vm.clone());
    match vm {
        Some(vm) => PodError::Boot(VmError::Exited(vm.exited().await)),
        None => std::future::pending().await,
    }
}

/// Returns None if the root file system is on a disk already.
pub(super) async fn base_disk(plan: &CreatePlan, id: &str) -> Result<Option<Rootdisk>, PodError> {
    let Some(source) = plan.rootfs.source.clone() else { return Ok(None) };
    let config::RootdiskConfig { dir, min_size_mib, mke2fs, .. } = plan.config.rootdisk.clone();
    let id = id.to_owned();
    let (plan, all) = (plan.rootfs.clone(), plan.config.clone());
    let build = move || {
        let cache = RootdiskCache::open(&dir)?;
        if let Some(base) = layer::base_of_existing_disk(&plan, &all, &cache)? {
            return Ok(base);
        }
        let options = BuildOptions { min_size: min_size_mib << 20, mke2fs };
        cache.get_or_build(&source, &options, &mut |progress| match progress {
            RootdiskProgress::Hashed { .. } => tracing::debug!(id, "rootdisk: {progress}"),
            _ => tracing::info!(id, "rootdisk: {progress}"),
        })
    };
    spawn_blocking(build).await.map_err(PodError::Worker)?.map(Some).map_err(PodError::Rootdisk)
}

pub(super) fn read_injected(files: &[Injected]) -> Result<Vec<InjectedFile>, PodError> {
    let read = |path: &Path| -> io::Result<(Vec<u8>, u32)> {
        let file = File::open(path)?;
        let mode = file.metadata()?.mode() & 0o777;
        let mut content = Vec::new();
        file.take(MAX_INJECTED + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_INJECTED {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("larger than {MAX_INJECTED} bytes"),
            ));
        }
        Ok((content, mode))
    };
    files
        .iter()
        .map(|Injected { source, destination }| {
            let (content, mode) =
                read(source).map_err(|error| PodError::Injected { path: source.clone(), source: error })?;
            Ok(InjectedFile { destination: destination.clone(), content, mode, ..Default::default() })
        })
        .collect()
}

pub(super) fn request(
    id: &str,
    guest_spec: &Spec,
    disks: &ContainerDisks<DiskAddress>,
    stdio: Stdio,
    files: Vec<InjectedFile>,
) -> Result<CreateContainerRequest, PodError> {
    let disk = |address: &Option<DiskAddress>| {
        let disk =
            |address: &DiskAddress| Disk { target: address.target, lun: address.lun, ..Default::default() };
        MessageField::from_option(address.as_ref().map(disk))
    };
    Ok(CreateContainerRequest {
        container_id: id.to_owned(),
        oci_config: serde_json::to_vec(guest_spec).map_err(PodError::Encode)?,
        rootfs: MessageField::some(Rootfs {
            base: disk(&disks.base),
            writable: disk(&disks.writable),
            ..Default::default()
        }),
        stdio: MessageField::some(stdio),
        files,
        ..Default::default()
    })
}
