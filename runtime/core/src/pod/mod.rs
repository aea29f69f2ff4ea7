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
mod connections;
mod container;
mod copies;
mod cover;
mod create;
mod error;
pub mod event;
mod exec;
mod exit;
mod frozen;
mod hooks;
mod host_disks;
mod host_limits;
mod id;
mod inspect;
mod kill_clock;
mod layer;
pub mod leftovers;
mod mounted;
mod namespaces;
mod out_of_memory;
mod pause;
mod phases;
mod pids;
mod process;
mod receive;
mod restore;
pub mod rootfs;
mod sandbox;
mod sandbox_container;
mod sandbox_files;
mod secrets;
pub mod state;
pub mod stats;
pub mod stdio;
mod streams;
mod update;
mod verify;
mod volumes;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
};

use machinen_base::error::chain;
use machinen_vm::{Vm, agent};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::timeout,
};

use crate::{
    config::Config,
    host_cgroup::HostCgroup,
    pool::WarmVm,
    shares::PodShares,
    traces::{self, Endpoint, Traces},
};
use event::PodEvent;
use kill_clock::KILL_PATIENCE;
use leftovers::VM_DIR;
use sandbox::{Sandbox, SandboxSettings};
use state::{PodRequest, ProcessExit, ProcessState, StateError, Transition};
use stdio::StreamOwner;

pub use checkpoint::CheckpointRequest;
pub use container::Container;
pub use copies::CopyError;
pub use create::CreateRequest;
pub use error::PodError;
pub use exec::ExecRequest;
pub use host_disks::HostDiskError;
pub use id::{ContainerId, ExecId, IdError, ProcessId, SignalScope};
pub use inspect::{ContainerDescription, ContainerProcessInfo, PodDescription, VmDescription};
pub use namespaces::NamespaceError;
pub use process::ContainerProcess;
pub use sandbox::{Lifetime, admits_one_more, default_vm_spec};
pub use sandbox_container::{IdMapping, SandboxRequest};
pub use sandbox_files::DnsConfig;
pub use secrets::{ContainerSecret, SecretsRequest};

/// One VM and the containers in it. Clones are handles of the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    shared: Arc<PodShared>,
}

/// What a pod is made with.
#[derive(Debug)]
pub struct PodSettings {
    /// The configuration, without the containers' annotations.
    pub config: Config,
    /// containerd's namespace, which is passed to logging programs and can have templates of its own.
    pub namespace: String,
    /// Name of the VM in logs and process lists.
    pub name: String,
    /// Directory in which the pod's files are, among them records for the time after this process was killed
    /// ([`leftovers`]). It exists, and belongs to this pod alone.
    pub state_dir: PathBuf,
    /// When the VM ends.
    pub lifetime: Lifetime,
    /// The pod's cgroup on the host if its first container names none. The pod is not in a cgroup of its own without it, or if
    /// the group cannot be made.
    pub default_cgroup: Option<PathBuf>,
    /// The socket of the containerd that the pod's containers belong to, if it is known. Members of the warm
    /// pool end when that containerd has ended.
    pub containerd: Option<PathBuf>,
}

#[derive(Debug)]
struct PodShared {
    config: Arc<Config>,
    namespace: String,
    name: String,
    state_dir: PathBuf,
    events: mpsc::UnboundedSender<PodEvent>,
    sandbox: Sandbox,
    containers: Mutex<HashMap<ContainerId, ContainerSlot>>,
    /// The container that stands for the pod itself, if a client has asked for one.
    sandbox_container: OnceLock<ContainerId>,
    /// Where the pod's processes are on the host.
    cgroup: HostCgroup,
    /// The server of the containers' volumes.
    shares: PodShares,
    /// One permit is held while a process's streams are open and the agent has not claimed them.
    starting: Arc<Semaphore>,
    traces: Traces,
}

#[derive(Debug, Clone)]
enum ContainerSlot {
    /// The id is reserved while its container is being created. The channel ends with the creation.
    Creating(watch::Receiver<()>),
    Ready(Arc<Container>),
}

impl Pod {
    /// Creates an empty pod; its VM starts with its first container, which uses `warm_vm` if that fits. Events
    /// are sent in the order of occurrence.
    pub fn new(
        settings: PodSettings,
        warm_vm: Option<WarmVm>,
        events: mpsc::UnboundedSender<PodEvent>,
    ) -> Self {
        let PodSettings { config, namespace, name, state_dir, lifetime, default_cgroup, containerd } =
            settings;
        let config = Arc::new(config);
        let starting = Arc::new(Semaphore::new(streams::STARTING));
        let sandbox = SandboxSettings {
            config: Arc::clone(&config),
            name: name.clone(),
            namespace: namespace.clone(),
            dir: state_dir.join(VM_DIR),
            lifetime,
            containerd,
            unclaimed: Arc::clone(&starting),
        };
        // The configuration's own endpoint was checked when it was read.
        let endpoint = Endpoint::find(&config.traces.endpoint).unwrap_or_else(|error| {
            tracing::warn!("there are no traces: {error}");
            None
        });
        let shared = PodShared {
            config,
            namespace,
            name,
            state_dir,
            events,
            sandbox: Sandbox::new(sandbox, warm_vm),
            containers: Mutex::default(),
            sandbox_container: OnceLock::new(),
            cgroup: HostCgroup::new(default_cgroup),
            shares: PodShares::default(),
            starting,
            traces: Traces::to(endpoint),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Starts a container's init, or a process that was added to it; returns the pid of the container's anchor.
    ///
    /// # Errors
    /// The process does not exist or was started before, or its command cannot be executed.
    pub async fn start(&self, process: &ProcessId) -> Result<u32, PodError> {
        let trace = self.trace(if process.exec.is_some() { "exec" } else { "start" }, &process.container);
        let started = match &process.exec {
            None => self.start_init(&process.container).await,
            Some(exec) => self.start_exec(&process.container, exec).await,
        };
        trace.end(&started, Vec::new);
        started
    }

    /// Begins the trace of an operation.
    fn trace(&self, name: &'static str, id: &ContainerId) -> traces::Running {
        self.shared.traces.begin(name, &self.shared.name, id.as_str())
    }

    async fn start_init(&self, id: &ContainerId) -> Result<u32, PodError> {
        let container = self.container(id)?;
        self.start_in_guest(&container).await?;
        // The container may end meanwhile, so no transition waits for the hooks.
        self.run_poststart_hooks(&container).await;
        self.shared.sandbox.work_ahead(&self.shared.cgroup.home().await).await;
        Ok(container.pid)
    }

    async fn start_in_guest(&self, container: &Arc<Container>) -> Result<(), PodError> {
        let id = &container.id;
        let _ordered = container.init.transitions.lock().await;
        container.check(PodRequest::Start)?;
        let agent = self.agent(id).await?;
        if let Some(network) = &container.network {
            // A client may have set the namespace up only now.
            network.open(&agent).await.map_err(PodError::Network)?;
        }
        let stdin = container.init.open_stdin()?;
        let started = agent.start_container(id, container.hooks.time_in_guest()).await;
        started.map_err(|source| PodError::guest("start", id, source))?;
        if let Some(network) = &container.network {
            network.container_started();
        }
        container.init.feed(stdin);
        container
            .init
            .advance(Transition::Start)
            .map_err(|source| PodError::state(PodRequest::Start, id, source))?;
        self.emit(PodEvent::Started { id: id.clone(), pid: container.pid });
        container.release_checkpoint(agent);
        Ok(())
    }

    /// Sends `signal` to a process of a container, or to all of them.
    ///
    /// SIGKILL ends the container whatever the guest does: if the agent does not deliver it in time, or the
    /// container has not ended in time ([`KillClock`](kill_clock::KillClock)), the VM is killed, and with it
    /// all containers of the pod.
    ///
    /// # Errors
    /// The process does not exist or is not running, or the agent does not answer.
    pub async fn kill(&self, scope: &SignalScope, signal: u32) -> Result<(), PodError> {
        let id = scope.container().as_str();
        let container = self.container(scope.container())?;
        let fatal = signal == libc::SIGKILL as u32 && scope.includes_init();
        if fatal {
            container.kill_clock.start();
        }
        let sent = async {
            let target = container.signal_target(scope).await?;
            let sent = self.agent(id).await?.signal_process(id, &target, signal).await;
            sent.map_err(|source| PodError::guest("signal", &scope.to_string(), source))
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
            Err(_) => {
                Err(PodError::Unanswered { verb: "signal", id: scope.to_string(), deadline: KILL_PATIENCE })
            }
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
    pub async fn export_layer(&self, id: &ContainerId) -> Result<(), PodError> {
        let container = self.container(id)?;
        let vm = self.vm_of(id).await?;
        let agent =
            vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })?;
        // SIGKILL does not wait for an export: the container's last one follows when it has ended.
        let killed = container.kill_clock.started();
        container.layer.export_at_pause(&vm, &agent, id, killed).await.map_err(PodError::Export)?;
        Ok(())
    }

    /// Deletes a stopped container, or an added process that has stopped. What was never started is ended
    /// first, and a creation that is in progress is waited for: its client has gone away. Nothing of the container or process is left when this returns.
    ///
    /// # Errors
    /// The container or process does not exist or is running.
    pub async fn delete(&self, process: &ProcessId) -> Result<(u32, ProcessExit), PodError> {
        match &process.exec {
            None => self.delete_container(&process.container).await,
            Some(exec) => self.delete_exec(&process.container, exec).await,
        }
    }

    async fn delete_container(&self, id: &ContainerId) -> Result<(u32, ProcessExit), PodError> {
        let creating = match self.containers().get(id) {
            Some(ContainerSlot::Creating(creating)) => Some(creating.clone()),
            Some(ContainerSlot::Ready(_)) | None => None,
        };
        let Some(mut creating) = creating else { return self.delete_created(id).await };
        let (pod, id) = (self.clone(), id.clone());
        // A task of its own: containerd does not wait as long as a creation may take.
        let deleted = tokio::spawn(async move {
            // Nothing is sent: the channel ends.
            let _ = creating.changed().await;
            pod.delete_created(&id).await
        });
        deleted.await.map_err(PodError::Worker)?
    }

    async fn delete_created(&self, id: &ContainerId) -> Result<(u32, ProcessExit), PodError> {
        let container = self.container(id)?;
        if container.state() == ProcessState::Created {
            // The container ends in time even if the guest refuses the signal.
            if let Err(error) = self.kill(&SignalScope::One(id.init()), libc::SIGKILL as u32).await {
                tracing::debug!(id = id.as_str(), "SIGKILL was not delivered: {}", chain(&error));
            }
            container.exited().await;
        }
        container.check(PodRequest::Delete)?;
        let exit = container.exited().await;
        container.gone_from_guest().await;
        let _only_delete = container.deleting.lock().await;
        self.run_poststop_hooks(id).await;
        let removed = self.containers().remove(id).is_some();
        self.release_cgroup(id).await;
        if removed {
            self.emit(PodEvent::Deleted { id: id.clone(), pid: container.pid, exit });
        }
        Ok((container.pid, exit))
    }

    /// Ends a process's stdin after the data that is in its fifo now. The process need not have started.
    ///
    /// # Errors
    /// The process does not exist.
    pub fn close_stdin(&self, process: &ProcessId) -> Result<(), PodError> {
        self.container(&process.container)?.process(process.exec.as_ref())?.close_stdin();
        Ok(())
    }

    /// Ends the VM and all containers in it, because the owner is ending. Each container reports its exit
    /// first.
    pub async fn end(&self) {
        self.shared.sandbox.end().await;
        self.shared.shares.settle().await;
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for entry in containers {
            if let ContainerSlot::Ready(container) = entry {
                container.gone_from_guest().await;
            }
        }
        if self.has_sandbox()
            && let Err(error) = self.remove_sandbox_files().await
        {
            tracing::warn!("{}", chain(&error));
        }
        self.shared.cgroup.release("", || true).await;
    }

    /// # Errors
    /// The container does not exist, or is still being created.
    pub fn container(&self, id: &ContainerId) -> Result<Arc<Container>, PodError> {
        match self.containers().get(id) {
            Some(ContainerSlot::Ready(container)) => Ok(Arc::clone(container)),
            Some(ContainerSlot::Creating(_)) => Err(PodError::BeingCreated { id: id.to_string() }),
            None => Err(PodError::NoContainer { id: id.to_string() }),
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
        self.shared.sandbox.vm().await.ok_or_else(|| PodError::Gone { id: id.to_owned() })
    }

    fn owner(&self, id: &str) -> StreamOwner {
        StreamOwner { namespace: self.shared.namespace.clone(), id: id.to_owned() }
    }

    async fn agent(&self, id: &str) -> Result<agent::Client, PodError> {
        let vm = self.vm_of(id).await?;
        vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, ContainerSlot>> {
        self.shared.containers.lock().expect("no panic while held")
    }

    fn emit(&self, event: PodEvent) {
        if self.shared.sandbox_container.get() == Some(event.container()) {
            return;
        }
        // The receiver is closed only when the owner of the pod is ending.
        let _ = self.shared.events.send(event);
    }
}
