//! A pod: one VM and the containers in it. A single container is a pod of one.
//!
//! ```text
//!   create ---> config, bundle, rootfs plan              (pure: nothing to undo)
//!           \-> VM cloned, or boots | base disk found or built | writable disk made | anchor    (concurrently)
//!            -> disks attached as they become ready -> agent answers -> streams -> CreateContainer
//!   start  ---> StartContainer; a watcher waits for the end since create
//!   end    ---> output drained -> Stopped, event -> last container: VM powers off
//!   delete ---> the entry is removed when nothing is left in the guest
//! ```
//! The owner of a [`Pod`] owns its VM: the shim, or the command line's monitor.

pub mod anchor;
mod checkpoint;
mod checkpoint_guest;
mod container;
mod create;
mod error;
pub mod event;
mod exec;
mod exit;
mod host_limits;
mod layer;
mod native_disk;
mod out_of_memory;
mod pause;
mod phases;
mod pids;
mod process;
mod provision;
mod receive;
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
    sync::{Arc, Mutex, OnceLock, atomic::AtomicBool},
};

use machinen_vm::{Vm, VmSpec, agent};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Duration, timeout},
};

use crate::{
    config::{Config, VmConfig},
    host_cgroup::HostCgroup,
    pool::WarmVm,
};
use event::PodEvent;
use provision::Afterwards;
use state::{PodRequest, ProcessExit, ProcessState, StateError, Transition};
use stdio::StreamOwner;

pub use checkpoint::CheckpointRequest;
pub use container::Container;
pub use create::CreateRequest;
pub use error::PodError;
pub use exec::ExecRequest;
pub use pids::HostProcess;
pub use process::ContainerProcess;
pub use provision::{admits_one_more, default_vm_spec};

/// How long the guest may take to deliver a signal.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// One VM and the containers in it. Clones are handles of the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    shared: Arc<PodShared>,
}

/// What the pod's VM was made of.
#[derive(Debug)]
struct DescribedVm {
    spec: VmSpec,
    /// The configuration of the container that it was made for.
    requested: VmConfig,
}

#[derive(Debug)]
struct PodShared {
    config: Config,
    /// containerd's namespace, which is passed to logging programs.
    namespace: String,
    /// Name of the VM in logs and process lists.
    name: String,
    /// Directory of the pod's sockets and the console log; created with the first container, removed with the
    /// VM.
    dir: PathBuf,
    events: mpsc::UnboundedSender<PodEvent>,
    /// Locked by create and by the end of the last container, so that the VM is started and ended once.
    vm: tokio::sync::Mutex<Option<Vm>>,
    /// A clone that was made ahead of time, until the first container.
    warm_vm: Mutex<Option<WarmVm>>,
    /// The socket of containerd, if the pod's owner knows it.
    containerd: OnceLock<PathBuf>,
    afterwards: Mutex<Afterwards>,
    /// Describes the newest VM of the pod, from before it starts. None: no container was created yet.
    described_vm: Mutex<Option<DescribedVm>>,
    containers: Mutex<HashMap<String, ContainerSlot>>,
    /// Where the pod's processes are on the host.
    cgroup: HostCgroup,
    /// One permit is held while a process's streams are open and the agent has not claimed them.
    starting: Arc<Semaphore>,
    /// A container could not be removed from the guest, so its disk may not have been synced.
    unsynced: AtomicBool,
}

#[derive(Debug, Clone)]
enum ContainerSlot {
    /// The id is reserved while its container is being created.
    Creating,
    Ready(Arc<Container>),
}

impl Pod {
    /// Creates an empty pod; its VM starts with its first container. Events are sent in the order of
    /// occurrence.
    pub fn new(
        config: Config,
        namespace: String,
        name: String,
        dir: PathBuf,
        events: mpsc::UnboundedSender<PodEvent>,
    ) -> Self {
        let shared = PodShared {
            config,
            namespace,
            name,
            dir,
            events,
            vm: tokio::sync::Mutex::default(),
            warm_vm: Mutex::default(),
            containerd: OnceLock::new(),
            afterwards: Mutex::default(),
            described_vm: Mutex::default(),
            containers: Mutex::default(),
            cgroup: HostCgroup::default(),
            starting: Arc::new(Semaphore::new(streams::STARTING)),
            unsynced: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Starts the user's process; returns the pid of the container's anchor.
    ///
    /// # Errors
    /// The container does not exist or was started before, or its command cannot be executed.
    pub async fn start(&self, id: &str) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let _ordered = container.init.transitions.lock().await;
        container.check(PodRequest::Start)?;
        let agent = self.agent(id).await?;
        let stdin = container.init.open_stdin()?;
        agent.start_container(id).await.map_err(|source| PodError::guest("start", id, source))?;
        container.init.feed(stdin);
        container
            .init
            .advance(Transition::Start)
            .map_err(|source| PodError::state(PodRequest::Start, id, source))?;
        self.emit(PodEvent::Started { id: id.to_owned(), pid: container.pid });
        container.release_checkpoint(agent);
        let home = self.shared.cgroup.home().await;
        self.request_template(&home);
        self.refill_pool(&home);
        Ok(container.pid)
    }

    /// Sends `signal` to a process of the container (the init if `exec_id` is empty), or with `all` to all of
    /// them.
    ///
    /// SIGKILL works even if the guest hangs: if the agent does not deliver it in time, its VM is killed, and
    /// with it all containers of the pod.
    ///
    /// # Errors
    /// The process does not exist or is not running, or the agent does not answer.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let container = self.container(id)?;
        let name = container.name(exec_id);
        let fatal = signal == libc::SIGKILL as u32 && (exec_id.is_empty() || all);
        let sent = async {
            let guest_id = container.guest_id(exec_id, PodRequest::Signal).await?;
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
            // On "not found" containerd waits for the exit; any other answer would keep it from deleting the
            // container.
            Ok(Err(error)) if error.is_loss_of_the_vm() => Err(PodError::Gone { id: id.to_owned() }),
            Ok(sent) => sent,
        }
    }

    /// Copies what a container has written so far to its snapshot. Its processes must be frozen in the guest.
    ///
    /// # Errors
    /// The container does not exist, or the export fails; the snapshot is unchanged then.
    pub async fn export_layer(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let vm = self.vm_of(id).await?;
        let agent =
            vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })?;
        container.layer.export(&vm, &agent, id).await.map_err(PodError::Export)?;
        Ok(())
    }

    /// Deletes a stopped container, or ends one that was never started. Nothing of the container is left when
    /// this returns.
    ///
    /// # Errors
    /// The container does not exist or is running.
    pub async fn delete(&self, id: &str) -> Result<(u32, ProcessExit), PodError> {
        let container = self.container(id)?;
        if container.state() == ProcessState::Created {
            match self.kill(id, "", libc::SIGKILL as u32, false).await {
                Ok(()) | Err(PodError::State { .. } | PodError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
            container.exited().await;
        }
        container.check(PodRequest::Delete)?;
        let exit = container.exited().await;
        container.gone_from_guest().await;
        let removed = self.containers().remove(id).is_some();
        self.shared.cgroup.release(id, || self.is_empty()).await;
        if removed {
            self.emit(PodEvent::Deleted { id: id.to_owned(), pid: container.pid, exit });
        }
        Ok((container.pid, exit))
    }

    /// Ends a process's stdin after the data that is in its fifo now. The process need not have started.
    ///
    /// # Errors
    /// The process does not exist.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), PodError> {
        self.container(id)?.process(exec_id)?.close_stdin();
        Ok(())
    }

    /// Ends the VM and all containers in it, because the owner is ending. Each container reports its exit
    /// first.
    pub async fn end(&self) {
        let unused = self.take_warm_vm().map(|warm| warm.vm);
        let vm = self.shared.vm.lock().await.take();
        for vm in unused.into_iter().chain(vm) {
            vm.kill().await;
        }
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for entry in containers {
            if let ContainerSlot::Ready(container) = entry {
                container.gone_from_guest().await;
            }
        }
        self.shared.cgroup.release("", || true).await;
    }

    /// # Errors
    /// The container does not exist, or is still being created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.containers().get(id) {
            Some(ContainerSlot::Ready(container)) => Ok(Arc::clone(container)),
            Some(ContainerSlot::Creating) => Err(PodError::BeingCreated { id: id.to_owned() }),
            None => Err(PodError::NoContainer { id: id.to_owned() }),
        }
    }

    /// The configuration of the pod, without the containers' annotations.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Whether no container exists or is being created.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    async fn vm_of(&self, id: &str) -> Result<Vm, PodError> {
        self.shared.vm.lock().await.clone().ok_or_else(|| PodError::Gone { id: id.to_owned() })
    }

    fn owner(&self, id: &str) -> StreamOwner {
        StreamOwner { namespace: self.shared.namespace.clone(), id: id.to_owned() }
    }

    async fn agent(&self, id: &str) -> Result<agent::Client, PodError> {
        let vm = self.vm_of(id).await?;
        vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })
    }

    fn described_vm(&self) -> std::sync::MutexGuard<'_, Option<DescribedVm>> {
        self.shared.described_vm.lock().expect("no panic while held")
    }

    /// Memory of the VM, MiB; 0 if no container was created yet.
    fn vm_memory_mib(&self) -> u32 {
        self.described_vm().as_ref().map_or(0, |vm| vm.spec.memory_mib)
    }

    fn vm_vcpus(&self) -> u32 {
        self.described_vm().as_ref().map_or(0, |vm| vm.spec.vcpus)
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<String, ContainerSlot>> {
        self.shared.containers.lock().expect("no panic while held")
    }

    fn emit(&self, event: PodEvent) {
        // The receiver is closed only when the owner of the pod is ending.
        let _ = self.shared.events.send(event);
    }
}
