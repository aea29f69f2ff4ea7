//! A container: its root file system, its cgroup, its processes, and which calls are allowed when.
//!
//! ```text
//!   create ──> Created ── start ──> Started ── (init ends) ──> delete
//!                 └────────────── delete ────────────────────────^
//! ```
//! "Stopped" is not a state of this diagram: the kernel knows whether the init has ended.

mod checkpoint;
mod exec;
mod files;
mod id_table;
mod pause;
mod rootfs;
mod view;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use machinen_protocol::{
    api,
    disks::RootDisks,
    error::{ErrorKind, HasKind},
    process::{ProcessRef, SignalTarget},
};
use nix::unistd::Uid;
use tokio::sync::watch;

pub(crate) use self::id_table::{IdError, IdTable};
use self::{
    checkpoint::{PlannedRestore, RestoreImage},
    files::FilesError,
    rootfs::{Rootfs, RootfsError},
};
use crate::{
    cgroup::{Cgroup, CgroupError},
    channel::Stream,
    console,
    context::Context,
    criu::{self, CriuError, Dumped, Fetching, HeldByCriu, Restored},
    disk::ScsiAddress,
    engine::{self, ContainerContext, Engine, EngineError, Prepared, WaitingInit},
    layer::{self, LayerError, Stamp},
    process::{Process, ProcessError, Started},
    reaper::Reaper,
    stdio::{AgentEnds, StdioError, Streams},
    view::{View, ViewError},
};

/// Parent of everything that the agent keeps about containers.
pub(crate) const STATE: &str = "/run/machinen";

#[derive(Debug)]
pub(crate) struct Container {
    dir: PathBuf,
    rootfs: Rootfs,
    /// The state of the upper directory before the command ran.
    initial_stamp: Option<Stamp>,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// Its other processes, by exec id.
    execs: IdTable<Process>,
    join_context: ContainerContext,
    view: View,
    stage: Mutex<StartStage>,
    memory: watch::Sender<MemoryState>,
    /// The images of the last dump, until the host knows where all of them are on the disk.
    dumped: Mutex<Option<Dumped>>,
}

/// Where the memory of a container is. A restored container may not have all of it yet.
#[derive(Debug, Clone)]
enum MemoryState {
    Complete,
    /// Some of it is still on the disk from which the container was restored.
    Pending,
    /// Some of it is lost, for this reason.
    Lost(Arc<CriuError>),
}

#[derive(Debug)]
enum StartStage {
    Created(PendingInit),
    Started,
}

/// An init that has not been started.
#[derive(Debug)]
enum PendingInit {
    /// It executes its command when it is started.
    New(WaitingInit),
    /// It continues from a checkpoint when it is started.
    Restored(Box<HeldByCriu>),
}

impl PendingInit {
    async fn start(self) -> Result<Option<Fetching>, ContainerError> {
        match self {
            Self::New(waiting) => Ok(waiting.start().await.map(|()| None)?),
            Self::Restored(held) => Ok(held.resume().await?),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("no root file system is given")]
    NoRootfs,
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error("{0}")]
    PagesLost(Arc<CriuError>),
    #[error("memory of the container is still being fetched from the checkpoint that it was restored from")]
    PagesPending,
    #[error("the container is not paused")]
    NotPaused,
    #[error("processes were added to the container and still run: {}", .execs.join(", "))]
    HasExecs { execs: Vec<String> },
    #[error("no disk is given for the checkpoint")]
    NoCheckpointDisk,
    #[error("the container was not dumped")]
    NotDumped,
    #[error(transparent)]
    View(#[from] ViewError),
    #[error("cannot export the container's changes")]
    Layer(#[from] LayerError),
    #[error("the container's disk is a snapshot itself, of which no archive is made")]
    NoLayer,
    #[error("no stream with token {token} is waiting for the archive")]
    NoStream { token: u64 },
    #[error("cannot {what} {path}")]
    State { what: &'static str, path: PathBuf, source: io::Error },
    #[error("container has been started already")]
    AlreadyStarted,
    #[error("container is still running")]
    Running,
    #[error("the init is deleted with its container")]
    IsInit,
    #[error(transparent)]
    Table(#[from] IdError),
}

impl HasKind for ContainerError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoRootfs
            | Self::IsInit
            | Self::NoLayer
            | Self::NoCheckpointDisk
            | Self::Files(_)
            | Self::Stdio(_) => ErrorKind::InvalidArgument,
            Self::Rootfs(_) | Self::NoStream { .. } => ErrorKind::NotFound,
            Self::AlreadyStarted
            | Self::Running
            | Self::NotPaused
            | Self::NotDumped
            | Self::PagesPending
            | Self::HasExecs { .. } => ErrorKind::FailedPrecondition,
            Self::Table(err) => err.kind(),
            Self::Engine(err) => err.kind(),
            Self::Process(err) => err.kind(),
            Self::Criu(err) => err.kind(),
            Self::PagesLost(err) => err.kind(),
            Self::Cgroup(err) => err.kind(),
            Self::View(err) => err.kind(),
            Self::Layer(_) | Self::State { .. } => ErrorKind::Internal,
        }
    }
}

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
    ) -> Result<(Self, Phases), ContainerError> {
        let dir = Path::new(STATE).join(&request.container_id);
        make_dir(&dir)?;
        let result = Self::create_in(context, request, &dir).await;
        if result.is_err()
            && let Err(err) = remove_dir(&dir)
        {
            console::report(&err);
        }
        result
    }

    async fn create_in(
        context: &Context,
        request: api::CreateContainerRequest,
        dir: &Path,
    ) -> Result<(Self, Phases), ContainerError> {
        let mut phases = Phases::new();
        let stdio = request.stdio.unwrap_or_default();
        let streams = Streams::claim(&stdio, &context.unclaimed).await?;
        let rootfs = request.rootfs.into_option().ok_or(ContainerError::NoRootfs)?;
        let disks = RootDisks::of_message(rootfs).ok_or(ContainerError::NoRootfs)?;
        let disks = disks.map(|disk| ScsiAddress::from(&disk));
        let disks = async { Ok(context.disks.find(disks).await.map_err(RootfsError::from)?) };
        let image = async {
            match request.checkpoint.into_option() {
                Some(checkpoint) => RestoreImage::find(&context.disks, checkpoint).await.map(Some),
                None => Ok(None),
            }
        };
        let (disks, image) = tokio::try_join!(disks, image)?;
        phases.done("disks");
        let rootfs = Rootfs::mount(dir, &disks)?;
        drop(disks);
        phases.done("mounts");
        let files = files::write(&dir.join("files"), &request.files)?;
        let prepared = Prepared::new(
            &request.container_id,
            dir,
            rootfs.path(),
            &request.oci_config,
            files.clone(),
            stdio.terminal,
        );
        let made = match prepared {
            Ok(prepared) => {
                phases.done("spec");
                let restore = image.as_ref().map(|image| image.plan(dir, rootfs.path(), &files));
                let Context { engine, reaper, .. } = context;
                let made = make(engine, reaper, &prepared, streams, restore, &mut phases).await;
                made.map(|made| (made, prepared.join_context().clone()))
            }
            Err(err) => Err(EngineError::from(err).into()),
        };
        match made {
            Ok(((cgroup, init, pending), join_context)) => {
                let (init, execs) = (Arc::new(init), IdTable::new("process"));
                let stage = Mutex::new(StartStage::Created(pending));
                let initial_stamp = rootfs.upper().as_deref().and_then(Stamp::take);
                Ok((
                    Self {
                        dir: dir.to_owned(),
                        rootfs,
                        initial_stamp,
                        cgroup,
                        init,
                        execs,
                        join_context,
                        view: View::default(),
                        stage,
                        memory: watch::Sender::new(MemoryState::Complete),
                        dumped: Mutex::default(),
                    },
                    phases,
                ))
            }
            Err(err) => {
                rootfs.unmount().unwrap_or_else(|err| console::report(&err));
                Err(err)
            }
        }
    }

    /// Has the init execute the user's command, or a restored container continue.
    ///
    /// # Errors
    /// The container was started before, it has ended, or the command cannot be executed.
    pub(crate) async fn start(&self) -> Result<(), ContainerError> {
        let pending = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(&mut *stage, StartStage::Started) {
                StartStage::Created(pending) => pending,
                StartStage::Started => return Err(ContainerError::AlreadyStarted),
            }
        };
        if self.init.has_exited() {
            return Err(ProcessError::Finished.into());
        }
        let restored = matches!(pending, PendingInit::Restored(_));
        match pending.start().await {
            Ok(None) => {}
            Ok(Some(fetching)) => self.follow_fetching(fetching),
            Err(error) => {
                if restored {
                    // Some of its processes may run.
                    self.cgroup.kill()?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether the container was restored and has not been started yet.
    fn waits_after_restore(&self) -> bool {
        matches!(
            *self.stage.lock().unwrap_or_else(PoisonError::into_inner),
            StartStage::Created(PendingInit::Restored(_))
        )
    }

    pub(crate) fn init(&self) -> &Process {
        &self.init
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The cgroup of a container that runs.
    ///
    /// # Errors
    /// The container has ended.
    pub(crate) fn running_cgroup(&self) -> Result<&Cgroup, ContainerError> {
        if self.init.has_exited() { Err(ProcessError::Finished.into()) } else { Ok(&self.cgroup) }
    }

    /// Sends a signal to one process, or to all. SIGKILL also ends frozen processes, whose writes must not
    /// block on a frozen file system.
    ///
    /// # Errors
    /// There is no such process, or no such signal.
    pub(crate) fn signal(&self, target: &SignalTarget, signal: i32) -> Result<(), ContainerError> {
        if signal == libc::SIGKILL
            && !self.init.has_exited()
            && let Err(err) = self.rootfs.thaw()
        {
            // The processes are killed anyway.
            console::report(&err);
        }
        let SignalTarget::One(process) = target else { return Ok(self.cgroup.signal_all(signal)?) };
        // CRIU traces the processes of a restored container until the container is started, and would see the
        // end of a single process first: kill all of them.
        if signal == libc::SIGKILL && process.is_init() && self.waits_after_restore() {
            return Ok(self.cgroup.signal_all(signal)?);
        }
        Ok(self.process(process)?.signal(signal)?)
    }

    /// # Errors
    /// There is no such process.
    pub(crate) fn process(&self, process: &ProcessRef) -> Result<Arc<Process>, ContainerError> {
        match process {
            ProcessRef::Init => Ok(Arc::clone(&self.init)),
            ProcessRef::Exec(exec_id) => Ok(self.execs.get(exec_id)?),
        }
    }

    /// Whether nothing was written to the root file system since the container was created.
    pub(crate) fn layer_unchanged(&self) -> bool {
        let upper = self.rootfs.upper();
        self.initial_stamp.as_ref().zip(upper).is_some_and(|(stamp, upper)| stamp.matches(&upper))
    }

    /// Sends the container's changes to the host. The container must have ended or be frozen.
    ///
    /// # Errors
    /// A file cannot be read, or the host does not take the archive.
    pub(crate) async fn export_layer(&self, stream: Stream) -> Result<u64, ContainerError> {
        if self.init.has_exited() {
            // Where the init has no pid namespace of its own, other processes may write a moment longer.
            self.cgroup.kill()?;
            self.cgroup.emptied().await?;
            self.view.end().await;
        }
        Ok(layer::export(self.rootfs.upper().ok_or(ContainerError::NoLayer)?, stream).await?)
    }

    /// Removes a container that does not run. The call may be repeated after an error.
    ///
    /// # Errors
    /// The container runs, or something of it cannot be removed.
    pub(crate) async fn delete(&self) -> Result<(), ContainerError> {
        let never_started =
            matches!(*self.stage.lock().unwrap_or_else(PoisonError::into_inner), StartStage::Created(_));
        if !self.init.has_exited() {
            if !never_started {
                return Err(ContainerError::Running);
            }
            self.cgroup.kill()?;
            self.init.exited().await;
        }
        self.init.close();
        clear(&self.cgroup).await?;
        // The disk from which it was restored is mounted in its directory until it was started and has all of
        // its memory.
        let pending = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *stage, StartStage::Started)
        };
        drop(pending);
        // So is the disk to which it was dumped, if the host has not read all of it.
        drop(self.dumped().take());
        if let Err(err) = self.pages_fetched().await {
            console::report(&err);
        }
        for exec in self.execs.all() {
            exec.close();
        }
        self.view.end().await;
        self.rootfs.sync()?;
        self.rootfs.unmount()?;
        remove_dir(&self.dir)
    }

    /// Writes the container's data to its disk while the VM shuts down. Its processes have ended by then.
    pub(crate) fn shut_down(&self) {
        if let Err(err) = self.rootfs.unmount() {
            console::report(&err);
        }
    }
}

/// Has the engine create the container, or CRIU restore it, and supervises its init.
async fn make(
    engine: &Engine,
    reaper: &Reaper,
    prepared: &Prepared,
    streams: Streams,
    restore: Option<PlannedRestore<'_>>,
    phases: &mut Phases,
) -> Result<(Cgroup, Process, PendingInit), ContainerError> {
    let pipes = restore.as_ref().map(PlannedRestore::pipes).unwrap_or_default();
    let (process_ends, pending) = streams.ends(Uid::from_raw(prepared.owner()), pipes)?;
    let cgroup = Cgroup::new(prepared.cgroup_path());
    let create = async {
        cgroup.create(prepared.devices())?;
        phases.done("cgroup");
        let (pid, exit, pending_init, unread) = match restore {
            None => {
                let created = engine.create(reaper, prepared, process_ends).await?;
                let engine::Created { pid, exit, waiting } = created;
                phases.done("engine");
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

/// Kills all processes in a cgroup and removes it.
async fn clear(cgroup: &Cgroup) -> Result<(), CgroupError> {
    cgroup.kill()?;
    cgroup.remove().await
}

fn make_dir(dir: &Path) -> Result<(), ContainerError> {
    fs::create_dir_all(dir).map_err(|source| ContainerError::State {
        what: "create",
        path: dir.to_owned(),
        source,
    })
}

/// Removes the agent's own files. Nothing is mounted below `dir` any more: [`Rootfs::unmount`] has removed
/// its mount points, and a mount point that is left makes this fail instead of descending.
fn remove_dir(dir: &Path) -> Result<(), ContainerError> {
    criu::clear(dir)?;
    for path in [dir.join("files"), dir.join(engine::DIR)] {
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ContainerError::State { what: "remove", path, source });
            }
            _ => {}
        }
    }
    fs::remove_dir(dir).map_err(|source| ContainerError::State {
        what: "remove",
        path: dir.to_owned(),
        source,
    })
}
