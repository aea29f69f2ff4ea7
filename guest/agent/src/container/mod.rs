//! A container: its root file system, its cgroup, its processes, and what may happen to it when.
//!
//! ```text
//!   create ──> Created ── start ──> Started ── (init ends) ──> delete
//!                 └────────────── delete ────────────────────────^
//! ```
//! "Stopped" is not a state of its own: it is what the kernel says about the init.

mod files;
mod rootfs;
mod table;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use machinen_protocol::api;
use nix::unistd::Uid;

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
    engine::{self, EngineError, Prepared, Waiting},
    process::{Process, ProcessError, Started},
    stdio::{StdioError, Streams},
};

/// Parent of all that the agent keeps about containers.
pub(crate) const STATE: &str = "/run/machinen";

#[derive(Debug)]
pub(crate) struct Container {
    dir: PathBuf,
    rootfs: Rootfs,
    cgroup: Cgroup,
    init: Process,
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    Created(Waiting),
    Started,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("no root file system is given")]
    NoRootfs,
    #[error("a terminal is not supported yet")]
    Terminal,
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
    #[error("cannot {what} {path}")]
    State { what: &'static str, path: PathBuf, source: io::Error },
    #[error("container has been started already")]
    AlreadyStarted,
    #[error("container is still running")]
    Running,
    #[error("container has no process {exec_id}")]
    NoProcess { exec_id: String },
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
        if stdio.terminal {
            return Err(ContainerError::Terminal);
        }
        let rootfs = request.rootfs.into_option().ok_or(ContainerError::NoRootfs)?;
        let (Some(base), Some(writable)) = (rootfs.base.as_ref(), rootfs.writable.as_ref()) else {
            return Err(ContainerError::NoRootfs);
        };
        let (base, writable) =
            parts.disks.find(base.into(), writable.into()).await.map_err(RootfsError::from)?;
        phases.done("disks");
        let rootfs = Rootfs::mount(dir, &base, &writable)?;
        drop((base, writable));
        phases.done("mounts");
        let files = files::write(&dir.join("files"), &request.files)?;
        let prepared = Prepared::new(&request.container_id, dir, rootfs.path(), &request.oci_config, files);
        let made = match prepared {
            Ok(prepared) => {
                phases.done("spec");
                make(parts, &prepared, streams, &mut phases).await
            }
            Err(err) => Err(EngineError::from(err).into()),
        };
        match made {
            Ok((cgroup, init, waiting)) => {
                let stage = Mutex::new(Stage::Created(waiting));
                Ok((Self { dir: dir.to_owned(), rootfs, cgroup, init, stage }, phases))
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
        let waiting = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            match std::mem::replace(&mut *stage, Stage::Started) {
                Stage::Created(waiting) => waiting,
                Stage::Started => return Err(ContainerError::AlreadyStarted),
            }
        };
        if self.init.has_exited() {
            return Err(ProcessError::Finished.into());
        }
        Ok(waiting.start().await?)
    }

    pub(crate) fn init(&self) -> &Process {
        &self.init
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The process that an exec_id names; the init is "".
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn process(&self, exec_id: &str) -> Result<&Process, ContainerError> {
        match exec_id {
            "" => Ok(&self.init),
            _ => Err(ContainerError::NoProcess { exec_id: exec_id.to_owned() }),
        }
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

/// Has the engine make the container, and takes charge of its init.
async fn make(
    parts: &Parts,
    prepared: &Prepared,
    streams: Streams,
    phases: &mut Phases,
) -> Result<(Cgroup, Process, Waiting), ContainerError> {
    let (process_ends, agent_ends) = streams.pipes(Uid::from_raw(prepared.owner()))?;
    let cgroup = Cgroup::new(prepared.cgroup_path());
    let create = async {
        cgroup.create(prepared.devices())?;
        phases.done("cgroup");
        Ok::<_, ContainerError>(parts.engine.create(&parts.reaper, prepared, process_ends).await?)
    };
    let created = match create.await {
        Ok(created) => created,
        Err(err) => {
            clear(&cgroup).await.unwrap_or_else(|err| crate::console::say(&crate::console::chain(&err)));
            return Err(err);
        }
    };
    phases.done("engine");
    let engine::Created { pid, exit, waiting } = created;
    let outlived_by = (!prepared.has_pid_namespace()).then(|| cgroup.clone());
    let started = Started { pid, exit, ends: agent_ends, outlived_by, cgroup: cgroup.clone() };
    Ok((cgroup, Process::supervise(started, parts.reaper.clone()), waiting))
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
