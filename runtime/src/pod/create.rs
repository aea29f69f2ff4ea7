//! Creating a container: from a bundle to an init that waits in the guest.
//!
//! What needs nothing of each other runs at once, and the guest boots meanwhile. A failure at any step takes down
//! what the earlier ones made; only the base disk stays, since it is a cache.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_protocol::api::{CreateContainerRequest, Disk, InjectedFile, Rootfs, Stdio};
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use tokio::{sync::watch, task::spawn_blocking};

use super::{
    Container, Entry, Event, Pod, PodError,
    anchor::Anchor,
    birth::Origin,
    checkpoint::{self, Restore},
    container::Storage,
    layer::{self, Layer},
    phases::Phases,
    rootfs::{self, RootfsMount},
    stdio::{HostStdio, StdioNames},
    streams::{self, Outputs, Streams},
};
use crate::{
    agent, annotations,
    assets::Assets,
    checkpoint::ImageDisk,
    config::{self, Config},
    rootdisk::{BuildOptions, Rootdisk, RootdiskCache, RootdiskProgress},
    spec::{
        bundle,
        guest::{self, GuestSpec, Injected, MAX_INJECTED},
    },
    view::ViewGuest,
    vm::{DiskAddress, DiskBacking, DiskSpec, Vm, VmError},
};

/// A request to create a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Create {
    /// Unique in the pod.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// How the caller would have the root file system mounted; empty: `root.path` of the configuration.
    pub rootfs: Vec<RootfsMount>,
    pub stdio: StdioNames,
    /// Directory of the checkpoint that the container is to go on from, instead of executing its command. Not used any
    /// more when the container has been created.
    pub checkpoint: Option<PathBuf>,
}

/// What the guest is asked to make, decided before anything was touched.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) config: Config,
    pub(super) assets: Assets,
    pub(super) guest: GuestSpec,
    pub(super) rootfs: rootfs::Plan,
    pub(super) restore: Option<Restore>,
}

/// The disks of a container: what its image has, and what it writes; or one of them, which has all.
#[derive(Debug)]
pub(super) struct Disks<T, C = T> {
    pub(super) base: Option<T>,
    pub(super) writable: Option<T>,
    /// What it goes on from.
    pub(super) checkpoint: Option<C>,
}

impl Pod {
    /// Creates a container; its init waits in the guest when this returns. Returns the pid of its anchor.
    ///
    /// # Errors
    /// What is wrong with the bundle, the rootfs or this host. Nothing is left behind.
    pub async fn create(&self, create: Create) -> Result<u32, PodError> {
        let id = create.id.clone();
        match self.containers().entry(id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => return Err(PodError::Exists { id }),
            std::collections::hash_map::Entry::Vacant(vacant) => vacant.insert(Entry::Creating),
        };
        // In a task of its own, so that a caller that goes away leaves no half-made container.
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

    async fn create_reserved(&self, create: Create) -> Result<u32, PodError> {
        let phases = Phases::default();
        let asked = Box::new(create.clone());
        let all = phases.time("create", self.create_timed(create, &phases)).await;
        let (container, watched, origin) = all?;
        let (id, pid) = (container.id.clone(), container.pid);
        self.containers().insert(id.clone(), Entry::Ready(Arc::clone(&container)));
        self.emit(Event::Created { pid, create: asked });
        tracing::info!(id, pid, %origin, phases = %phases, "container created");
        let Watched { agent, vm, outputs } = watched;
        tokio::spawn(self.clone().watch(container, agent, vm, outputs));
        Ok(pid)
    }

    async fn create_timed(
        &self,
        create: Create,
        phases: &Phases,
    ) -> Result<(Arc<Container>, Watched, Origin), PodError> {
        let prepared = self.prepare(&create)?;
        let mut host_stdio = HostStdio::open(&create.stdio, &self.owner(&create.id))?;
        let injected = read_injected(&prepared.guest.injected)?;
        let (launched, mut vm) = watch::channel(None);
        let launch = async {
            let birth = phases.time("vm-launch", self.vm(&prepared)).await?;
            // In the place of a clone that ends another VM boots, when its disks are there.
            launched.send_replace(Some(birth.vm.clone()).filter(|_| !birth.origin.is_clone()));
            Ok(birth)
        };
        let disks = async {
            tokio::try_join!(
                phases.time("rootdisk", base_disk(&prepared, &create.id)),
                phases.time("writable", layer::open_disk(&prepared.rootfs, &prepared.config)),
                checkpoint::restore_disk(prepared.restore.as_ref(), phases),
            )
        };
        // A conversion can take long: a VM that ends meanwhile is told at once.
        let disks = async {
            tokio::select! { disks = disks => disks, error = lost(&mut vm) => Err(error) }
        };
        let stdio = async { host_stdio.ready().await.map_err(PodError::from) };
        let (birth, (base, mut writable, checkpoint), ()) = tokio::try_join!(launch, disks, stdio)?;
        let key = base.as_ref().map(|base| base.key);
        let overlaid = key.filter(|_| prepared.rootfs.is_overlaid());
        if let Some(restore) = &prepared.restore {
            restore.check_rootfs(overlaid)?;
        }
        let mut files =
            Disks { base: base.map(|base| base.file), writable: writable.file.take(), checkpoint };
        if prepared.rootfs.read_only {
            files.base = files.writable.take();
        }
        // From here on the guest goes on by itself; what this process does meanwhile costs the start nothing.
        let mut anchor = Anchor::spawn(&create.id, prepared.guest.netns.as_deref())?;
        let (birth, (disks, agent)) = match ready(&birth.vm, &create.id, &files, phases).await {
            Err(error) if birth.origin.is_clone() => {
                let birth = self.boot_instead(&prepared, birth, &error).await?;
                let ready = ready(&birth.vm, &create.id, &files, phases).await?;
                (birth, ready)
            }
            ready => (birth, ready?),
        };
        let vm = birth.vm.clone();
        let _starting = self.shared.starting.acquire().await.expect("never closed");
        let (stdio, streams) = phases.time("streams", streams::connect(&vm, host_stdio)).await?;
        let guest_spec = prepared.guest.for_vm(self.vm_vcpus());
        let mut request = request(&create.id, &guest_spec, &disks, stdio, injected)?;
        if let Some(restore) = &prepared.restore {
            request.checkpoint = MessageField::some(restore.request(
                disks.checkpoint,
                prepared.config.restore,
                &guest_spec,
                self.vm_vcpus(),
            ));
        }
        let created =
            phases.time("guest-create", agent.create_container(request)).await.map_err(|source| {
                match (&prepared.restore, &files.checkpoint) {
                    (Some(restore), Some(disk)) => restore.refused(disk, source),
                    _ => PodError::guest("create", &create.id, source),
                }
            })?;
        phases.record_guest(&created);
        // It has been for long; its pid must not be told before.
        phases.time("anchor", anchor.settled()).await?;
        let layer = Layer::new(&prepared.rootfs, &prepared.config, key, writable.keep());
        let storage = Storage {
            layer,
            base: overlaid,
            checkpoint: disks
                .checkpoint
                .zip(files.checkpoint)
                .map(|(address, disk)| checkpoint::Source { address, disk }),
            taking: prepared.config.checkpoint,
            rootfs: create.rootfs.clone(),
        };
        let (container, watched) = self.assemble(create, anchor, agent, vm, streams, storage);
        Ok((container, watched, birth.origin))
    }

    /// Everything that can be refused without touching anything.
    pub(super) fn prepare(&self, create: &Create) -> Result<Prepared, PodError> {
        let spec = bundle::load(&create.bundle)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let config = annotations::apply(&self.shared.config, &annotations)?;
        let rootfs = rootfs::plan(&create.rootfs, &spec, &create.bundle)?;
        let guest = guest::reduce(spec, &create.id)?;
        let assets = Assets::find(&config)?;
        let restore = create.checkpoint.as_ref().map(|dir| Restore::read(&create.id, dir)).transpose()?;
        Ok(Prepared { config, assets, guest, rootfs, restore })
    }

    fn assemble(
        &self,
        create: Create,
        anchor: Anchor,
        agent: agent::Client,
        vm: Vm,
        mut streams: Streams,
        storage: Storage,
    ) -> (Arc<Container>, Watched) {
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
        (Arc::new(container), Watched { agent, vm, outputs })
    }

    /// Takes down what a failed create left: the id, and the VM if no other container uses it.
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
    }
}

/// Attaches the disks while the guest comes to life.
pub(super) async fn ready(
    vm: &Vm,
    id: &str,
    files: &Disks<File, ImageDisk>,
    phases: &Phases,
) -> Result<(Disks<DiskAddress>, agent::Client), PodError> {
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
    Ok((Disks { base, writable, checkpoint }, agent))
}

/// What the watcher of a container needs.
struct Watched {
    agent: agent::Client,
    vm: Vm,
    outputs: Outputs,
}

/// Resolves when the VM has ended; never, while there is none.
async fn lost(launched: &mut watch::Receiver<Option<Vm>>) -> PodError {
    let vm = launched.wait_for(Option::is_some).await.ok().and_then(|vm| vm.clone());
    match vm {
        Some(vm) => PodError::Boot(VmError::Exited(vm.exited().await)),
        None => std::future::pending().await,
    }
}

/// None where the root file system is on a disk already.
pub(super) async fn base_disk(prepared: &Prepared, id: &str) -> Result<Option<Rootdisk>, PodError> {
    let Some(source) = prepared.rootfs.source.clone() else { return Ok(None) };
    let config::Rootdisk { dir, min_size_mib, mke2fs, .. } = prepared.config.rootdisk.clone();
    let id = id.to_owned();
    let (plan, all) = (prepared.rootfs.clone(), prepared.config.clone());
    let build = move || {
        let cache = RootdiskCache::open(&dir)?;
        if let Some(base) = layer::base_of_left_disk(&plan, &all, &cache)? {
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
    disks: &Disks<DiskAddress>,
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
