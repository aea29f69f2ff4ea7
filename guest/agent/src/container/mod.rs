//! A container: its root file system, its cgroup, its processes, and what may happen to it when.
//!
//! ```text
//!   create ──> Created ── start ──> Started ── (init ends) ──> delete
//!                 └────────────── delete ────────────────────────^
//! ```
//! "Stopped" is not a state of its own: it is what the kernel says about the init.

mod checkpoint;
mod exec;
mod files;
mod pause;
mod rootfs;
mod table;
mod view;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use machinen_protocol::api;
use nix::unistd::Uid;
use tokio::sync::watch;

pub(crate) use self::{
    files::FileMount,
    table::{Table, TableError},
};
use self::{
    files::FilesError,
    rootfs::{Rootfs, RootfsError},
};
use crate::{
    agent::Parts,
    cgroup::{Cgroup, CgroupError},
    channel::Stream,
    criu::{self, CriuError, Dumped, Fetching, Held, Restored},
    disk::Layers,
    engine::{self, EngineError, Prepared, Tenancy, Waiting},
    layer::{self, LayerError, Stamp},
    process::{Process, ProcessError, Started},
    stdio::{AgentEnds, StdioError, Streams},
    view::{View, ViewError},
};

/// Parent of all that the agent keeps about containers.
pub(crate) const STATE: &str = "/run/machinen";

#[derive(Debug)]
pub(crate) struct Container {
    dir: PathBuf,
    rootfs: Rootfs,
    /// What the upper directory was like before the command ran.
    before: Option<Stamp>,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// Its other processes, by exec id.
    execs: Table<Process>,
    tenancy: Tenancy,
    view: View,
    stage: Mutex<Stage>,
    pages: watch::Sender<Pages>,
    /// What it was dumped to, until the host knows where that is.
    dumped: Mutex<Option<Dumped>>,
}

/// Where the memory of a container is.
#[derive(Debug, Clone)]
enum Pages {
    Here,
    /// Some of it is still on the disk that the container was restored from.
    Pending,
    /// Why there is no more of it.
    Lost(Arc<CriuError>),
}

#[derive(Debug)]
enum Stage {
    Created(Waits),
    Started,
}

/// What keeps an init from running.
#[derive(Debug)]
enum Waits {
    /// It has yet to execute its command.
    New(Waiting),
    /// It goes on from a checkpoint.
    Restored(Box<Held>),
}

impl Waits {
    async fn start(self) -> Result<Option<Fetching>, ContainerError> {
        match self {
            Self::New(waiting) => Ok(waiting.start().await.map(|()| None)?),
            Self::Restored(held) => Ok(held.release().await?),
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
    #[error("the container's disk is its own snapshot, of which there is no archive")]
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
    Table(#[from] TableError),
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
    /// Makes a container whose init waits to be started. Nothing of it is left when this fails.
    ///
    /// # Errors
    /// The request, its disks or its spec are not usable.
    pub(crate) async fn create(
        parts: &Parts,
        request: api::CreateContainerRequest,
    ) -> Result<(Self, Phases), ContainerError> {
        let dir = Path::new(STATE).join(&request.container_id);
        make_dir(&dir)?;
        let result = Self::create_in(parts, request, &dir).await;
        if result.is_err()
            && let Err(err) = remove_dir(&dir)
        {
            crate::console::say(&crate::console::chain(&err));
        }
        result
    }

    async fn create_in(
        parts: &Parts,
        request: api::CreateContainerRequest,
        dir: &Path,
    ) -> Result<(Self, Phases), ContainerError> {
        let mut phases = Phases::new();
        let stdio = request.stdio.unwrap_or_default();
        let streams = Streams::claim(&stdio, &parts.unclaimed).await?;
        let rootfs = request.rootfs.into_option().ok_or(ContainerError::NoRootfs)?;
        let [base, writable] = [&rootfs.base, &rootfs.writable].map(|disk| disk.as_ref().map(Into::into));
        let disks = Layers::of(base, writable).ok_or(ContainerError::NoRootfs)?;
        let disks = async { Ok(parts.disks.find(disks).await.map_err(RootfsError::from)?) };
        let from = async {
            match request.checkpoint.into_option() {
                Some(from) => checkpoint::From::find(parts, from).await.map(Some),
                None => Ok(None),
            }
        };
        let (disks, from) = tokio::try_join!(disks, from)?;
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
                let origin = from.as_ref().map(|from| from.place(dir, rootfs.path(), &files));
                let made = make(parts, &prepared, streams, origin, &mut phases).await;
                made.map(|made| (made, prepared.tenancy().clone()))
            }
            Err(err) => Err(EngineError::from(err).into()),
        };
        match made {
            Ok(((cgroup, init, waits), tenancy)) => {
                let (init, execs) = (Arc::new(init), Table::new("process"));
                let stage = Mutex::new(Stage::Created(waits));
                let before = rootfs.upper().as_deref().and_then(Stamp::take);
                Ok((
                    Self {
                        dir: dir.to_owned(),
                        rootfs,
                        before,
                        cgroup,
                        init,
                        execs,
                        tenancy,
                        view: View::default(),
                        stage,
                        pages: watch::Sender::new(Pages::Here),
                        dumped: Mutex::default(),
                    },
                    phases,
                ))
            }
            Err(err) => {
                rootfs.unmount().unwrap_or_else(|err| crate::console::say(&crate::console::chain(&err)));
                Err(err)
            }
        }
    }

    /// Lets the init execute the user's command.
    ///
    /// # Errors
    /// It was started before, it has ended, or the command cannot be executed.
    pub(crate) async fn start(&self) -> Result<(), ContainerError> {
        let waits = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(&mut *stage, Stage::Started) {
                Stage::Created(waits) => waits,
                Stage::Started => return Err(ContainerError::AlreadyStarted),
            }
        };
        if self.init.has_exited() {
            return Err(ProcessError::Finished.into());
        }
        let held = matches!(waits, Waits::Restored(_));
        match waits.start().await {
            Ok(None) => {}
            Ok(Some(fetching)) => self.fetch(fetching),
            Err(error) => {
                if held {
                    // Half of it may run.
                    self.cgroup.kill()?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Restored, and not started yet.
    fn is_held(&self) -> bool {
        matches!(
            *self.stage.lock().unwrap_or_else(PoisonError::into_inner),
            Stage::Created(Waits::Restored(_))
        )
    }

    pub(crate) fn init(&self) -> &Process {
        &self.init
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The cgroup, while there is somebody in it.
    ///
    /// # Errors
    /// The init has ended.
    pub(crate) fn live_cgroup(&self) -> Result<&Cgroup, ContainerError> {
        if self.init.has_exited() { Err(ProcessError::Finished.into()) } else { Ok(&self.cgroup) }
    }

    /// Sends a signal to a process, or to all; the init is "". SIGKILL ends processes that are held too, and what they write
    /// while they end must not wait.
    ///
    /// # Errors
    /// There is no such process, or no such signal.
    pub(crate) fn signal(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), ContainerError> {
        if signal == libc::SIGKILL
            && !self.init.has_exited()
            && let Err(err) = self.rootfs.thaw()
        {
            // No reason not to kill.
            crate::console::say(&crate::console::chain(&err));
        }
        // Of a process that is being traced, which one that is restored is until it starts, CRIU hears the end first.
        if all || (signal == libc::SIGKILL && exec_id.is_empty() && self.is_held()) {
            return Ok(self.cgroup.signal_all(signal)?);
        }
        Ok(self.process(exec_id)?.signal(signal)?)
    }

    /// The process that an exec_id names; the init is "".
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        match exec_id {
            "" => Ok(Arc::clone(&self.init)),
            _ => Ok(self.execs.get(exec_id)?),
        }
    }

    /// Whether nothing was written to the root file system since the container was created.
    pub(crate) fn layer_unchanged(&self) -> bool {
        let upper = self.rootfs.upper();
        self.before.as_ref().zip(upper).is_some_and(|(before, upper)| before.holds(&upper))
    }

    /// Sends what the container has changed. It has ended, or its processes are frozen.
    ///
    /// # Errors
    /// Something of it cannot be read, or the host does not take it.
    pub(crate) async fn export_layer(&self, stream: Stream) -> Result<u64, ContainerError> {
        if self.init.has_exited() {
            // Where the init has no pid namespace of its own, others may write a moment longer.
            self.cgroup.kill()?;
            self.cgroup.emptied().await?;
            self.view.end().await;
        }
        Ok(layer::export(self.rootfs.upper().ok_or(ContainerError::NoLayer)?, stream).await?)
    }

    /// Removes everything of a container that does not run (any more). May be tried again after an error.
    ///
    /// # Errors
    /// It runs, or something cannot be removed.
    pub(crate) async fn delete(&self) -> Result<(), ContainerError> {
        let never_started =
            matches!(*self.stage.lock().unwrap_or_else(PoisonError::into_inner), Stage::Created(_));
        if !self.init.has_exited() {
            if !never_started {
                return Err(ContainerError::Running);
            }
            self.cgroup.kill()?;
            self.init.exited().await;
        }
        self.init.close();
        clear(&self.cgroup).await?;
        // What it was restored from is mounted in its directory until it has started, and has all of its memory.
        let waits = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *stage, Stage::Started)
        };
        drop(waits);
        // So is what it was dumped to, where the host could not write it.
        drop(self.dumped().take());
        if let Err(err) = self.pages_fetched().await {
            crate::console::say(&crate::console::chain(&err));
        }
        for exec in self.execs.all() {
            exec.close();
        }
        self.view.end().await;
        self.rootfs.sync()?;
        self.rootfs.unmount()?;
        remove_dir(&self.dir)
    }

    /// Writes the container's data to its disk while the VM goes down. Its processes are dead by then.
    pub(crate) fn shut_down(&self) {
        if let Err(err) = self.rootfs.unmount() {
            crate::console::say(&crate::console::chain(&err));
        }
    }
}

/// Has the engine make the container, or CRIU restore it, and takes charge of its init.
async fn make(
    parts: &Parts,
    prepared: &Prepared,
    streams: Streams,
    restored_at: Option<checkpoint::Place<'_>>,
    phases: &mut Phases,
) -> Result<(Cgroup, Process, Waits), ContainerError> {
    let pipes = restored_at.as_ref().map(checkpoint::Place::pipes).unwrap_or_default();
    let (process_ends, pending) = streams.ends(Uid::from_raw(prepared.owner()), pipes)?;
    let cgroup = Cgroup::new(prepared.cgroup_path());
    let create = async {
        cgroup.create(prepared.devices())?;
        phases.done("cgroup");
        let (pid, exit, waits, unread) = match restored_at {
            None => {
                let created = parts.engine.create(&parts.reaper, prepared, process_ends).await?;
                let engine::Created { pid, exit, waiting } = created;
                phases.done("engine");
                (pid, exit, Waits::New(waiting), Vec::new())
            }
            Some(place) => {
                let Restored { pid, exit, held, stdin } =
                    place.restore(parts, prepared, &cgroup, process_ends).await?;
                phases.done("criu");
                (pid, exit, Waits::Restored(Box::new(held)), stdin)
            }
        };
        let ends = AgentEnds { unread, ..pending.connect()? };
        Ok::<_, ContainerError>((pid, exit, waits, ends))
    };
    let (pid, exit, waits, ends) = match create.await {
        Ok(made) => made,
        Err(err) => {
            clear(&cgroup).await.unwrap_or_else(|err| crate::console::say(&crate::console::chain(&err)));
            return Err(err);
        }
    };
    let started = Started { pid, exit, ends, cgroup: cgroup.clone(), is_init: true };
    Ok((cgroup, Process::supervise(started, parts.reaper.clone()), waits))
}

/// Kills what is left in a cgroup and removes it.
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

/// Removes the agent's own files. Never called while something is mounted below: [`Rootfs::unmount`] has
/// removed its mount points before, and a mount point that is left makes this fail, not descend.
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
