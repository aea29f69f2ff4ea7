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
use protobuf::MessageField;
use tokio::task::spawn_blocking;

use super::{
    Container, Entry, Event, Pod, PodError, anchor,
    exit::Outputs,
    phases::Phases,
    rootfs::{self, RootfsMount},
    stdio::{HostStdio, Input, Output, StdioNames},
    vm_spec,
};
use crate::{
    agent, annotations,
    assets::Assets,
    config::{self, Config},
    process::Child,
    rootdisk::{self, BuildOptions, Progress, Rootdisk, RootdiskCache},
    spec::{
        bundle,
        guest::{self, GuestSpec, Injected, MAX_INJECTED},
    },
    vm::{DiskAddress, DiskSpec, Vm},
};

/// A request to create a container.
#[derive(Debug, Clone, Default)]
pub struct Create {
    /// Unique in the pod.
    pub id: String,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// How the caller would have the root file system mounted; empty: `root.path` of the configuration.
    pub rootfs: Vec<RootfsMount>,
    pub stdio: StdioNames,
}

/// What the guest is asked to make, decided before anything was touched.
#[derive(Debug, Clone)]
struct Prepared {
    config: Config,
    assets: Assets,
    guest: GuestSpec,
    rootfs: rootfs::Plan,
}

/// The two disks of a container, attached.
#[derive(Debug)]
struct Disks {
    base: DiskAddress,
    writable: DiskAddress,
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
        let all = phases.time("create", self.create_timed(create, &phases)).await;
        let (container, watched) = all?;
        let (id, pid) = (container.id.clone(), container.pid);
        self.containers().insert(id.clone(), Entry::Ready(Arc::clone(&container)));
        self.emit(Event::Created { id: id.clone(), pid });
        tracing::info!(id, pid, phases = %phases, "container created");
        let Watched { agent, vm, outputs } = watched;
        tokio::spawn(self.clone().watch(container, agent, vm, outputs));
        Ok(pid)
    }

    async fn create_timed(
        &self,
        create: Create,
        phases: &Phases,
    ) -> Result<(Arc<Container>, Watched), PodError> {
        let prepared = self.prepare(&create)?;
        let host_stdio = HostStdio::open(&create.stdio)?;
        let injected = read_injected(&prepared.guest.injected)?;
        let (vm, base, writable) = tokio::try_join!(
            phases.time("vm-launch", self.vm(&prepared)),
            phases.time("rootdisk", base_disk(&prepared, &create.id)),
            phases.time("writable", writable_disk(&prepared)),
        )?;
        // From here on the guest boots by itself; what this process does meanwhile costs the start nothing.
        let anchor = anchor::spawn(prepared.guest.netns.as_deref())?;
        let attach = async |what, disk: DiskSpec| {
            vm.attach_disk(disk).await.map_err(|source| PodError::Vm { what, source })
        };
        let base =
            DiskSpec { file: base.file.into(), read_only: true, serial: format!("base-{}", create.id) };
        let writable =
            DiskSpec { file: writable.into(), read_only: false, serial: format!("rw-{}", create.id) };
        let (base, writable, agent) = tokio::try_join!(
            phases.time("attach-base", attach("attach the base disk", base)),
            phases.time("attach-writable", attach("attach the writable layer", writable)),
            phases.time("vm-boot", async { vm.agent().await.map_err(PodError::Boot) }),
        )?;
        let disks = Disks { base, writable };
        let (stdio, streams) = phases.time("streams", connect_stdio(&vm, host_stdio)).await?;
        let request = request(&create.id, &prepared.guest, &disks, stdio, injected)?;
        let created = phases
            .time("guest-create", agent.create_container(request))
            .await
            .map_err(|source| PodError::guest("create", &create.id, source))?;
        phases.record_guest(&created);
        Ok(self.assemble(create, anchor, agent, vm, streams))
    }

    /// Everything that can be refused without touching anything.
    fn prepare(&self, create: &Create) -> Result<Prepared, PodError> {
        let spec = bundle::load(&create.bundle)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let config = annotations::apply(&self.shared.config, &annotations)?;
        let rootfs = rootfs::plan(&create.rootfs, &spec, &create.bundle)?;
        let guest = guest::reduce(spec, &create.id)?;
        let assets = Assets::find(&config)?;
        Ok(Prepared { config, assets, guest, rootfs })
    }

    /// The pod's VM, booting if this is its first container.
    async fn vm(&self, prepared: &Prepared) -> Result<Vm, PodError> {
        let mut slot = self.shared.vm.lock().await;
        if let Some(vm) = &*slot {
            return Ok(vm.clone());
        }
        let (name, prepared) = (self.shared.name.clone(), prepared.clone());
        let build = move || vm_spec::build(&name, &prepared.config, &prepared.assets, &prepared.guest.spec);
        let spec = spawn_blocking(build).await.map_err(PodError::Worker)??;
        let vm = Vm::launch(spec, &self.shared.dir).await.map_err(PodError::Boot)?;
        *slot = Some(vm.clone());
        Ok(vm)
    }

    fn assemble(
        &self,
        create: Create,
        anchor: Child,
        agent: agent::Client,
        vm: Vm,
        streams: Streams,
    ) -> (Arc<Container>, Watched) {
        let Streams { stdin, outputs } = streams;
        let stdin = stdin.map(|(stdin, to_guest)| {
            let (agent, id) = (agent.clone(), create.id.clone());
            Input::start(stdin, to_guest, async move |total| {
                if let Err(error) = agent.end_stdin(&id, "", total).await {
                    // A process that has ended needs no end of its stdin.
                    tracing::debug!(id, "end of stdin not delivered: {error}");
                }
            })
        });
        let container = Container::new(create.id, create.bundle, create.stdio, anchor, stdin);
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

/// What the watcher of a container needs.
struct Watched {
    agent: agent::Client,
    vm: Vm,
    outputs: Outputs,
}

/// The streams of a process, connected on both sides.
struct Streams {
    stdin: Option<(super::stdio::Stdin, crate::vm::BoxedStream)>,
    outputs: Outputs,
}

async fn base_disk(prepared: &Prepared, id: &str) -> Result<Rootdisk, PodError> {
    let config::Rootdisk { dir, min_size_mib, mke2fs, .. } = prepared.config.rootdisk.clone();
    let (source, id) = (prepared.rootfs.source.clone(), id.to_owned());
    let build = move || {
        let cache = RootdiskCache::open(&dir)?;
        let options = BuildOptions { min_size: min_size_mib << 20, mke2fs };
        cache.get_or_build(&source, &options, &mut |progress| match progress {
            Progress::Hashed { .. } => tracing::debug!(id, "rootdisk: {progress}"),
            _ => tracing::info!(id, "rootdisk: {progress}"),
        })
    };
    spawn_blocking(build).await.map_err(PodError::Worker)?.map_err(PodError::Rootdisk)
}

/// The container's writable layer: the one that an earlier start on the same snapshot left, or a fresh one.
async fn writable_disk(prepared: &Prepared) -> Result<File, PodError> {
    let path = prepared.rootfs.writable.clone();
    let size = prepared.config.rootdisk.writable_size_mib << 20;
    let config::Rootdisk { dir, mke2fs, .. } = prepared.config.rootdisk.clone();
    let open = move || {
        let disk = match path.exists() {
            true => rootdisk::open_writable(&path),
            false => RootdiskCache::open(&dir).and_then(|cache| cache.create_writable(&path, size, &mke2fs)),
        };
        disk.map_err(PodError::Writable)
    };
    spawn_blocking(open).await.map_err(PodError::Worker)?
}

fn read_injected(files: &[Injected]) -> Result<Vec<InjectedFile>, PodError> {
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

/// Opens a raw stream to the guest for each stream of the caller's.
async fn connect_stdio(vm: &Vm, host: HostStdio) -> Result<(Stdio, Streams), PodError> {
    let mut stdio = Stdio::default();
    let open = async || {
        vm.open_stream().await.map_err(|source| PodError::Vm { what: "open a stream to the guest", source })
    };
    let mut stdin = None;
    if let Some(source) = host.stdin {
        let (token, stream) = open().await?;
        stdio.stdin = token;
        stdin = Some((source, stream));
    }
    let mut outputs = Outputs { stdout: None, stderr: None };
    if let Some(sink) = host.stdout {
        let (token, stream) = open().await?;
        stdio.stdout = token;
        outputs.stdout = Some(Output::start("stdout", stream, sink));
    }
    if let Some(sink) = host.stderr {
        let (token, stream) = open().await?;
        stdio.stderr = token;
        outputs.stderr = Some(Output::start("stderr", stream, sink));
    }
    Ok((stdio, Streams { stdin, outputs }))
}

fn request(
    id: &str,
    guest: &GuestSpec,
    disks: &Disks,
    stdio: Stdio,
    files: Vec<InjectedFile>,
) -> Result<CreateContainerRequest, PodError> {
    let disk = |address: &DiskAddress| {
        MessageField::some(Disk { target: address.target, lun: address.lun, ..Default::default() })
    };
    Ok(CreateContainerRequest {
        container_id: id.to_owned(),
        oci_config: serde_json::to_vec(&guest.spec).map_err(PodError::Encode)?,
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
