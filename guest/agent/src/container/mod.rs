//! A container: its root file system, its cgroup, its processes, and which calls are allowed when.
//!
//! ```text
//!   create ──> Created ── start ──> Started ── (init ends) ──> delete
//!                 └────────────── delete ────────────────────────^
//! ```
//! "Stopped" is not a state of this diagram: the kernel knows whether the init has ended.

mod checkpoint;
pub(crate) mod copies;
mod copy_up;
mod create;
mod delete;
mod error;
mod exec;
mod files;
mod hooks;
mod host_disks;
mod id_table;
pub(crate) mod namespaces;
mod pause;
mod processes;
mod read_only_dev;
mod refresh;
mod restore;
mod rootfs;
pub(crate) mod secrets;
mod stage;
mod view;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use machinen_protocol::process::{ProcessRef, SignalTarget};
use tokio::sync::watch;

use self::{
    copies::Copies,
    hooks::StartHooks,
    host_disks::DiskMounts,
    namespaces::HeldNamespaces,
    rootfs::Rootfs,
    stage::{MemoryState, PendingInit, StartStage},
};
pub(crate) use self::{error::ContainerError, id_table::IdTable};
use crate::{
    cgroup::Cgroup,
    channel::Stream,
    console,
    context::Context,
    criu::Dumped,
    engine::ContainerContext,
    layer::{self, Stamp},
    process::{Process, ProcessError},
    view::View,
};

/// Parent of everything that the agent keeps about containers.
pub(crate) const STATE: &str = "/run/machinen";

#[derive(Debug)]
pub(crate) struct Container {
    dir: PathBuf,
    rootfs: Rootfs,
    /// Dropped after the processes have ended.
    host_disks: DiskMounts,
    copies: Copies,
    /// The state of the upper directory before the command ran.
    initial_stamp: Option<Stamp>,
    cgroup: Cgroup,
    init: Arc<Process>,
    /// The other processes, by exec id.
    execs: IdTable<Process>,
    join_context: ContainerContext,
    view: View,
    start_hooks: StartHooks,
    /// Other containers may be in them.
    namespaces: HeldNamespaces,
    /// The container's volumes, by their paths in the VM.
    volumes: Vec<PathBuf>,
    /// The user of the command, as the agent sees it.
    owner: u32,
    /// Held while secrets are written.
    secrets: tokio::sync::Mutex<()>,
    stage: Mutex<StartStage>,
    memory: watch::Sender<MemoryState>,
    /// The images of the last dump, until the host knows where all of them are on the disk.
    dumped: Mutex<Option<Dumped>>,
}

impl Container {
    /// Runs the hooks, and then has the init execute the user's command, or a restored container continue.
    ///
    /// # Errors
    /// The container was started before or has ended, a hook fails, or the command cannot be executed.
    pub(crate) async fn start(&self, context: &Context) -> Result<(), ContainerError> {
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
        if let Err(error) = refresh::refresh(self.volumes.clone()).await {
            self.cgroup.kill()?;
            return Err(error.into());
        }
        if let Err(error) = self.run_start_hooks(context).await {
            self.cgroup.kill()?;
            return Err(error.into());
        }
        let restored = matches!(pending, PendingInit::Restored(_));
        match pending.start().await {
            Ok(None) => {}
            Ok(Some(fetching)) => self.follow_fetching(fetching),
            Err(error) => {
                if restored {
                    // Some of the processes may run.
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
}
