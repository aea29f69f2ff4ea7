//! A pod: one VM and the containers in it. A single container is a pod of one.
//!
//! ```text
//!   create ---> config, bundle, rootfs plan              (pure: refusals cost nothing)
//!           \-> VM cloned, or boots | base disk found or built | writable disk made | anchor started      (all at once)
//!            -> disks attached as they become ready -> agent answers -> streams -> CreateContainer
//!   start  ---> StartContainer; a watcher waits for the end since create
//!   end    ---> output drained -> Stopped, event -> last container: VM powers off
//!   delete ---> the entry goes, when nothing is left in the guest
//! ```
//! Whoever owns a [`Pod`] owns its VM: the shim, or the command line's monitor.

pub mod anchor;
mod beside;
mod birth;
mod checkpoint;
mod container;
mod create;
mod dump;
mod error;
pub mod event;
mod exec;
mod exit;
mod layer;
mod out_of_memory;
mod pause;
mod phases;
mod pids;
mod process;
pub mod rootfs;
pub mod state;
pub mod stats;
pub mod stdio;
mod streams;
mod update;
mod verify;
mod vm_spec;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use tokio::{
    sync::{Semaphore, mpsc},
    time::{Duration, timeout},
};

pub(crate) use birth::CLONE_NEEDS;
pub use birth::{admits_one_more, plain_vm};
pub use checkpoint::Checkpoint;
pub use container::Container;
pub use create::Create;
pub use error::PodError;
use event::Event;
pub use exec::Exec;
pub use pids::HostProcess;
pub use process::Process;
use state::{Exit, State, StateError, Transition};
use stdio::Owner;

use crate::{
    agent,
    config::Config,
    pool::Ready,
    vm::{Vm, VmSpec},
};

/// Longest wait for the guest to take a signal.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// One VM and the containers in it; cheap to clone, all clones are the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    /// containerd's namespace, which logging programs are told.
    namespace: String,
    /// Names the VM in logs and process lists.
    name: String,
    /// Where the pod keeps its sockets and the console log; made by the first create, removed with the VM.
    dir: PathBuf,
    events: mpsc::UnboundedSender<Event>,
    /// Held by create and by the end of the last container, so that the VM is booted and ended once.
    vm: tokio::sync::Mutex<Option<Vm>>,
    /// A clone that was made ahead of time, until the first container.
    ready: Mutex<Option<Ready>>,
    /// The pod's VM is a clone like this, and the warm pool is to have more of them.
    repeated: Mutex<Option<VmSpec>>,
    /// Where containerd listens, if the pod's owner has said so.
    containerd: OnceLock<PathBuf>,
    /// A VM like this was booted because there is no template of it.
    wanted_template: Mutex<Option<VmSpec>>,
    /// How much memory the VM was given, MiB.
    vm_memory_mib: AtomicU32,
    vm_vcpus: AtomicU32,
    containers: Mutex<HashMap<String, Entry>>,
    /// Held while a process's streams are open and not claimed.
    starting: Arc<Semaphore>,
    /// A container's part of the guest could not be cleaned up, so its disk may not have been synced.
    unsynced: AtomicBool,
}

#[derive(Debug, Clone)]
enum Entry {
    /// The id is taken while its container is being created.
    Creating,
    Ready(Arc<Container>),
}

impl Pod {
    /// An empty pod; its VM boots with its first container. Events are sent in the order in which they happen.
    pub fn new(
        config: Config,
        namespace: String,
        name: String,
        dir: PathBuf,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let shared = Shared {
            config,
            namespace,
            name,
            dir,
            events,
            vm: tokio::sync::Mutex::default(),
            ready: Mutex::default(),
            repeated: Mutex::default(),
            containerd: OnceLock::new(),
            wanted_template: Mutex::default(),
            vm_memory_mib: AtomicU32::new(0),
            vm_vcpus: AtomicU32::new(0),
            containers: Mutex::default(),
            starting: Arc::new(Semaphore::new(streams::STARTING)),
            unsynced: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Lets the user's process run; returns the pid of the container's anchor.
    ///
    /// # Errors
    /// The container does not exist or was started before, or its command cannot be executed.
    pub async fn start(&self, id: &str) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let _ordered = container.init.transitions.lock().await;
        container.state().after(Transition::Start).map_err(|source| PodError::state("start", id, source))?;
        let agent = self.agent(id).await?;
        let stdin = container.init.open_stdin()?;
        agent.start_container(id).await.map_err(|source| PodError::guest("start", id, source))?;
        container.init.feed(stdin);
        container.init.advance(Transition::Start).map_err(|source| PodError::state("start", id, source))?;
        self.emit(Event::Started { id: id.to_owned(), pid: container.pid });
        container.release_checkpoint(agent);
        self.ask_for_template();
        self.refill_pool();
        Ok(container.pid)
    }

    /// Sends `signal` to a process of the container, or to all of them; the init is "".
    ///
    /// SIGKILL works even when the guest does not: an agent that does not take it in time loses its VM, and with it all
    /// containers of the pod.
    ///
    /// # Errors
    /// The process does not exist, does not run, or the agent does not answer.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let container = self.container(id)?;
        let name = container.name(exec_id);
        let fatal = signal == libc::SIGKILL as u32 && (exec_id.is_empty() || all);
        let sent = async {
            let guest_id = container.guest_id(exec_id, "signal").await?;
            let sent = self.agent(id).await?.signal_process(id, &guest_id, signal, all).await;
            sent.map_err(|source| PodError::guest("signal", &name, source))
        };
        match timeout(KILL_PATIENCE, sent).await {
            Err(_) if fatal => {
                tracing::error!(
                    id,
                    "the guest did not take SIGKILL within {KILL_PATIENCE:?}: killing its VM"
                );
                container.vm.kill().await;
                Ok(())
            }
            Err(_) => Err(PodError::Unanswered { verb: "signal", id: name, deadline: KILL_PATIENCE }),
            // Who hears "not found" waits for the exit; any other answer keeps containerd from deleting the container.
            Ok(Err(error)) if error.is_loss_of_the_vm() => Err(PodError::Gone { id: id.to_owned() }),
            Ok(sent) => sent,
        }
    }

    /// Brings what a container has written so far to its snapshot. Its processes must be frozen in the guest.
    ///
    /// # Errors
    /// The container does not exist, or its writes cannot be exported; the snapshot is as it was then.
    pub async fn export_layer(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let vm = self.vm_of(id).await?;
        let agent =
            vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })?;
        container.layer.export(&vm, &agent, id).await.map_err(PodError::Layer)?;
        Ok(())
    }

    /// Forgets a stopped container, or ends one that was never started. Nothing of it is left when this returns.
    ///
    /// # Errors
    /// The container does not exist or is running.
    pub async fn delete(&self, id: &str) -> Result<(u32, Exit), PodError> {
        let container = self.container(id)?;
        if container.state() == State::Created {
            match self.kill(id, "", libc::SIGKILL as u32, false).await {
                Ok(()) | Err(PodError::State { .. } | PodError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
            container.exited().await;
        }
        container
            .state()
            .after(Transition::Delete)
            .map_err(|source| PodError::state("delete", id, source))?;
        let exit = container.exited().await;
        container.gone_from_guest().await;
        if self.containers().remove(id).is_some() {
            self.emit(Event::Deleted { id: id.to_owned(), pid: container.pid, exit });
        }
        Ok((container.pid, exit))
    }

    /// A process's stdin ends when everything that was written to its fifo so far has been read. The process need not have
    /// started.
    ///
    /// # Errors
    /// The process does not exist.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), PodError> {
        self.container(id)?.process(exec_id)?.close_stdin();
        Ok(())
    }

    /// Ends the VM and all containers in it, as the owner is ending; each container reports its exit first.
    pub async fn end(&self) {
        let unused = self.take_ready().map(|ready| ready.vm);
        let vm = self.shared.vm.lock().await.take();
        for vm in unused.into_iter().chain(vm) {
            vm.kill().await;
        }
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for entry in containers {
            if let Entry::Ready(container) = entry {
                container.gone_from_guest().await;
            }
        }
    }

    /// # Errors
    /// There is no such container, or it is still being created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.containers().get(id) {
            Some(Entry::Ready(container)) => Ok(Arc::clone(container)),
            Some(Entry::Creating) => Err(PodError::BeingCreated { id: id.to_owned() }),
            None => Err(PodError::NoContainer { id: id.to_owned() }),
        }
    }

    /// What the pod's containers are run with, their annotations aside.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// No container exists or is being created.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    async fn vm_of(&self, id: &str) -> Result<Vm, PodError> {
        self.shared.vm.lock().await.clone().ok_or_else(|| PodError::Gone { id: id.to_owned() })
    }

    fn owner(&self, id: &str) -> Owner {
        Owner { namespace: self.shared.namespace.clone(), id: id.to_owned() }
    }

    async fn agent(&self, id: &str) -> Result<agent::Client, PodError> {
        let vm = self.vm_of(id).await?;
        vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })
    }

    fn vm_memory_mib(&self) -> u32 {
        self.shared.vm_memory_mib.load(Ordering::Relaxed)
    }

    fn vm_vcpus(&self) -> u32 {
        self.shared.vm_vcpus.load(Ordering::Relaxed)
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.shared.containers.lock().expect("no panic while held")
    }

    fn emit(&self, event: Event) {
        // Nobody listens any more only when the owner of the pod is ending.
        let _ = self.shared.events.send(event);
    }
}
