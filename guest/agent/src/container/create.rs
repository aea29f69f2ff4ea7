//! Creates a container: its disks are mounted, and its init waits to be started.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use machinen_protocol::{api, disks::RootDisks};
use nix::unistd::Uid;
use tokio::sync::watch;

use super::{
    Container, ContainerError, IdTable, STATE,
    copies::Copies,
    copy_up::copy_up,
    delete::{clear, remove_dir},
    files,
    hooks::StartHooks,
    host_disks,
    namespaces::{HeldNamespaces, NamespacePath},
    read_only_dev::read_only_dev,
    restore::{PlannedRestore, RestoreImage},
    rootfs::{Rootfs, RootfsError},
    stage::{MemoryState, PendingInit, StartStage},
};
use crate::{
    cgroup::Cgroup,
    console,
    context::Context,
    criu::Restored,
    disk::{Disk, ScsiAddress},
    engine::{self, ContainerContext, EngineError, IdMaps, Prepared, PreparedHook},
    layer::Stamp,
    process::{Process, Started},
    stdio::{AgentEnds, Streams},
    view::View,
};

/// The time that each phase of a creation took, for the host's log.
#[derive(Debug)]
pub(crate) struct Phases {
    since: std::time::Instant,
    done: Vec<api::Phase>,
}

impl Phases {
    fn new() -> Self {
        Self { since: std::time::Instant::now(), done: Vec::new() }
    }

    fn done(&mut self, name: &str) {
        let micros = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.done.push(api::Phase { name: name.to_owned(), micros, ..Default::default() });
        self.since = std::time::Instant::now();
    }

    pub(crate) fn into_messages(self) -> Vec<api::Phase> {
        self.done
    }
}

impl Container {
    /// Creates a container whose init waits to be started. A failed creation leaves nothing behind.
    ///
    /// # Errors
    /// The request, its disks or its spec are not usable.
    pub(crate) async fn create(
        context: &Context,
        request: api::CreateContainerRequest,
        joined: &[NamespacePath],
    ) -> Result<(Self, Phases), ContainerError> {
        let dir = Path::new(STATE).join(&request.container_id);
        make_dir(&dir)?;
        let result = Self::create_in(context, request, joined, &dir).await;
        if result.is_err()
            && let Err(err) = remove_dir(&dir)
        {
            console::report(&err);
        }
        result
    }

    async fn create_in(
        context: &Context,
        mut request: api::CreateContainerRequest,
        joined: &[NamespacePath],
        dir: &Path,
    ) -> Result<(Self, Phases), ContainerError> {
        let mut phases = Phases::new();
        let streams = Streams::claim(&request.stdio, &context.unclaimed).await?;
        let mapped = request.rootfs.mapped;
        let (disks, image) = find_disks(context, &mut request).await?;
        let host_disks = host_disks::provide(&context.disks, &mut request).await?;
        phases.done("disks");
        let copies = Copies::mount(&context.disks, dir, &mut request).await?;
        let owners = if mapped {
            Some((&context.engine, IdMaps::of_config(&request.oci_config).map_err(EngineError::from)?))
        } else {
            None
        };
        let rootfs = Rootfs::mount(dir, &disks, owners).await?;
        drop(disks);
        phases.done("mounts");
        let places = Places { dir, rootfs: rootfs.path(), copies: &copies.paths() };
        let made = make_init(context, &request, places, joined, streams, image.as_ref(), &mut phases);
        let Made { cgroup, init, pending, join_context, hooks, namespaces, volumes, owner } = match made.await
        {
            Ok(made) => made,
            Err(err) => {
                rootfs.unmount().unwrap_or_else(|err| console::report(&err));
                return Err(err);
            }
        };
        let container = Self {
            dir: dir.to_owned(),
            initial_stamp: rootfs.upper().as_deref().and_then(Stamp::take),
            rootfs,
            host_disks,
            copies,
            cgroup,
            init: Arc::new(init),
            execs: IdTable::new("process"),
            join_context,
            view: View::default(),
            namespaces,
            volumes,
            owner,
            secrets: tokio::sync::Mutex::default(),
            start_hooks: StartHooks { hooks, state: std::mem::take(&mut request.hook_state) },
            stage: Mutex::new(StartStage::Created(pending)),
            memory: watch::Sender::new(MemoryState::Complete),
            dumped: Mutex::default(),
        };
        Ok((container, phases))
    }
}

/// Waits until the disks are there: those of the root file system, and that of the checkpoint if the container
/// is restored.
async fn find_disks(
    context: &Context,
    request: &mut api::CreateContainerRequest,
) -> Result<(RootDisks<Disk>, Option<RestoreImage>), ContainerError> {
    let rootfs = request.rootfs.take().ok_or(ContainerError::NoRootfs)?;
    let disks = RootDisks::of_message(rootfs).ok_or(ContainerError::NoRootfs)?;
    let disks = disks.map(|disk| ScsiAddress::from(&disk));
    let disks = async { Ok(context.disks.find(disks).await.map_err(RootfsError::from)?) };
    let image = async {
        match request.checkpoint.take() {
            Some(checkpoint) => RestoreImage::find(&context.disks, checkpoint).await.map(Some),
            None => Ok(None),
        }
    };
    tokio::try_join!(disks, image)
}

/// A container's processes, before they are part of a container.
struct Made {
    cgroup: Cgroup,
    init: Process,
    pending: PendingInit,
    join_context: ContainerContext,
    hooks: Vec<PreparedHook>,
    namespaces: HeldNamespaces,
    volumes: Vec<PathBuf>,
    owner: u32,
}

/// Where a container's files are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places<'a> {
    /// The agent's directory of the container.
    pub(super) dir: &'a Path,
    pub(super) rootfs: &'a Path,
    /// Where the copies of the host's directories are mounted.
    pub(super) copies: &'a [PathBuf],
}

/// Prepares the configuration, and makes the init below the mounted root file system. A failure leaves no
/// process and no cgroup.
async fn make_init(
    context: &Context,
    request: &api::CreateContainerRequest,
    places: Places<'_>,
    joined: &[NamespacePath],
    streams: Streams,
    image: Option<&RestoreImage>,
    phases: &mut Phases,
) -> Result<Made, ContainerError> {
    let Places { dir, rootfs, .. } = places;
    let files = files::write(&dir.join("files"), &request.files)?;
    let (id, config) = (&request.container_id, &request.oci_config);
    let mut prepared = Prepared::new(id, dir, rootfs, config, files.clone(), joined, request.stdio.terminal)
        .map_err(EngineError::from)?;
    phases.done("spec");
    let restore = image.map(|image| image.plan(places, &files));
    let (cgroup, init, pending) = make(context, &prepared, streams, restore, phases).await?;
    let hooks = prepared.take_hooks();
    let namespaces = match HeldNamespaces::of(init.pid()) {
        Ok(namespaces) => namespaces,
        Err(err) => {
            clear(&cgroup).await.unwrap_or_else(|err| console::report(&err));
            return Err(err);
        }
    };
    let (join_context, volumes) = (prepared.join_context().clone(), prepared.volumes().to_vec());
    let owner = prepared.owner();
    Ok(Made { cgroup, init, pending, join_context, hooks, namespaces, volumes, owner })
}

/// Has the engine create the container, or CRIU restore it, and supervises its init.
async fn make(
    Context { engine, reaper, device_filters, .. }: &Context,
    prepared: &Prepared,
    streams: Streams,
    restore: Option<PlannedRestore<'_>>,
    phases: &mut Phases,
) -> Result<(Cgroup, Process, PendingInit), ContainerError> {
    let pipes = restore.as_ref().map(PlannedRestore::pipes).unwrap_or_default();
    let (process_ends, pending) = streams.ends(Uid::from_raw(prepared.owner()), pipes)?;
    let cgroup = Cgroup::new(prepared.cgroup_path());
    let create = async {
        cgroup.create(device_filters, prepared.devices())?;
        phases.done("cgroup");
        let killed = cgroup.killed_for_memory();
        let (pid, exit, pending_init, unread) = match restore {
            None => {
                let created = engine.create(reaper, prepared, process_ends).await;
                let created =
                    created.map_err(|err| explained(err, &cgroup, killed, prepared.memory_limit()))?;
                let engine::Created { pid, exit, waiting } = created;
                phases.done("engine");
                copy_up(prepared.rootfs(), pid, prepared.copied_up())?;
                if prepared.has_read_only_dev() {
                    read_only_dev(pid)?;
                }
                (pid, exit, PendingInit::New(waiting), Vec::new())
            }
            Some(restore) => {
                let Restored { pid, exit, held, stdin } =
                    restore.run(reaper, prepared, &cgroup, process_ends).await?;
                phases.done("criu");
                (pid, exit, PendingInit::Restored(Box::new(held)), stdin)
            }
        };
        let ends = AgentEnds { unread, ..pending.connect()? };
        Ok::<_, ContainerError>((pid, exit, pending_init, ends))
    };
    let (pid, exit, pending_init, ends) = match create.await {
        Ok(made) => made,
        Err(err) => {
            clear(&cgroup).await.unwrap_or_else(|err| console::report(&err));
            return Err(err);
        }
    };
    let started = Started { pid, exit, ends, cgroup: cgroup.clone(), is_init: true };
    Ok((cgroup, Process::supervise(started, reaper.clone()), pending_init))
}

/// The failure of a creation, which may be that the kernel has killed the init: then the engine knows only that nothing more
/// came from it. `killed` is how often that had happened before.
fn explained(err: EngineError, cgroup: &Cgroup, killed: u64, limit: Option<i64>) -> ContainerError {
    match (limit, err) {
        (Some(limit), err @ (EngineError::Failed { .. } | EngineError::Died { .. }))
            if cgroup.killed_for_memory() > killed =>
        {
            // What the engine saw says nothing more to the user.
            console::report(&err);
            ContainerError::MemoryLimit { limit }
        }
        (_, err) => err.into(),
    }
}

fn make_dir(dir: &Path) -> Result<(), ContainerError> {
    fs::create_dir_all(dir).map_err(|source| ContainerError::State {
        what: "create",
        path: dir.to_owned(),
        source,
    })
}
