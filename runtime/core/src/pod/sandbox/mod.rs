//! The sandbox of a pod: its VM, the containers that use it, and when it starts and ends.
//!
//! ```text
//!                acquire: a VM starts               release: the last container (Lifetime::Containers)
//!   Empty ──────────────────────────────> Running ─────────────────────────────────────────────> Empty
//!     │ (a warm VM until then)              │ (boot_instead: a clone that fails is replaced)
//!     └──────────────── end ────────────────┴──────────────────────────────────────────────────> Ended
//! ```
//! One lock guards the state. It is held while a VM starts and while it ends, so that each happens once, and
//! requests for the VM wait meanwhile. Nothing here knows how a container is created.

mod afterwards;
mod plan;
mod start;
mod vm_spec;

use std::{collections::HashSet, fmt, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use machinen_base::{error::chain, netns};
use machinen_vm::{SlotDisks, Vm, admission::Reservation};
use tokio::sync::{Mutex, Semaphore};

use super::PodError;
use crate::{
    config::{Config, VmConfig, annotations},
    network::{NetworkError, OutsideNetwork, PacketPath, PodNetwork},
    pool::WarmVm,
};
use afterwards::Afterwards;
use start::StartedVm;

pub use plan::{admits_one_more, default_vm_spec};
pub(super) use {
    plan::VmRequest,
    vm_spec::{ContainerLimits, host_overhead_mib},
};

/// Longest wait for a VM to sync its disks and power off before it is killed.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// When the VM of a pod ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// With the last container that uses it. The next container starts another VM.
    Containers,
    /// When the owner of the pod ends the pod, however many containers there are.
    Sandbox,
}

/// What a sandbox is made with.
#[derive(Debug)]
pub(super) struct SandboxSettings {
    /// The configuration, without the containers' annotations.
    pub(super) config: Arc<Config>,
    /// Name of the VM in logs and process lists.
    pub(super) name: String,
    /// containerd's namespace.
    pub(super) namespace: String,
    /// Directory of the VM's sockets and of the console log; created and removed with the VM.
    pub(super) dir: PathBuf,
    pub(super) lifetime: Lifetime,
    /// The socket of containerd, if the pod's owner knows it. Members of the warm pool end with that
    /// containerd.
    pub(super) containerd: Option<PathBuf>,
    /// Acquired while a stream is open that the agent has not claimed.
    pub(super) unclaimed: Arc<Semaphore>,
}

/// The VM of a pod.
#[derive(Debug)]
pub(super) struct Sandbox {
    settings: SandboxSettings,
    state: Mutex<SandboxState>,
}

/// Each variant holds what exists in that state.
#[derive(Debug)]
enum SandboxState {
    /// There is no VM in use. A clone that was made ahead of time waits for the first container, if the pod
    /// was given one.
    Empty {
        warm_vm: Option<Box<WarmVm>>,
    },
    Running(Box<RunningSandbox>),
    /// The owner has ended the sandbox: no further VM starts.
    Ended,
}

#[derive(Debug)]
struct RunningSandbox {
    vm: Vm,
    /// The configuration of the container that the VM was made for.
    requested: VmConfig,
    afterwards: Afterwards,
    users: VmUsers,
    /// The connection with the containers' network namespace, if they have one.
    network: Option<Arc<PodNetwork>>,
    /// A container could not be removed from the guest, so its disk may not have been synced.
    unsynced: bool,
}

/// The VM for a container that is being created.
#[derive(Debug)]
pub(super) struct AcquiredVm {
    pub(super) vm: Vm,
    pub(super) origin: VmOrigin,
    /// The VM has started with the disks that [`Sandbox::acquire`] was given.
    pub(super) has_disks: bool,
    /// Held until the container is created.
    _reservation: Option<Reservation>,
}

/// Where the VM of a container comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmOrigin {
    Clone,
    /// A clone that was made ahead of time, by a member of the warm pool.
    Warm,
    Boot,
    /// The VM that the pod's earlier containers use.
    Pod,
}

impl RunningSandbox {
    /// Returns when nothing of the VM, which has ended, is left in the network namespace.
    async fn network_ended(&self) {
        if let Some(network) = &self.network {
            network.ended().await;
        }
    }
}

impl VmOrigin {
    /// Whether a VM can be booted instead if this one fails.
    pub(super) fn is_clone(self) -> bool {
        matches!(self, Self::Clone | Self::Warm)
    }
}

impl fmt::Display for VmOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clone => "clone",
            Self::Warm => "ready",
            Self::Boot => "boot",
            Self::Pod => "pod",
        })
    }
}

impl Sandbox {
    /// Makes a sandbox without a VM in use. The first container uses `warm_vm` if it fits.
    pub(super) fn new(settings: SandboxSettings, warm_vm: Option<WarmVm>) -> Self {
        Self { settings, state: Mutex::new(SandboxState::Empty { warm_vm: warm_vm.map(Box::new) }) }
    }

    /// Returns the VM for a container, which uses it until [`Sandbox::release`]. The VM is starting if this
    /// is its first container. A clone starts with `disks`, if there are any, and waits for them.
    ///
    /// # Errors
    /// No VM can be started, the container's annotations require another VM than the one that runs, or the
    /// sandbox has ended.
    pub(super) async fn acquire(
        &self,
        container: &str,
        request: &VmRequest,
        disks: impl Future<Output = Option<SlotDisks>>,
    ) -> Result<AcquiredVm, PodError> {
        let mut state = self.state.lock().await;
        let warm_vm = match &mut *state {
            SandboxState::Ended => return Err(PodError::PodEnded { id: container.to_owned() }),
            SandboxState::Running(running) => {
                let RunningSandbox { vm, requested, users, .. } = &mut **running;
                annotations::check_join(&request.config, &request.annotations, requested, vm.spec())?;
                users.enter(container);
                return Ok(AcquiredVm {
                    vm: vm.clone(),
                    origin: VmOrigin::Pod,
                    has_disks: false,
                    _reservation: None,
                });
            }
            SandboxState::Empty { warm_vm } => warm_vm,
        };
        let plan = self.plan(request, warm_vm.as_deref()).await?;
        let started = self.start(plan, warm_vm.take().map(|warm| *warm), request, disks).await?;
        Ok(Self::run(&mut state, started, container, request))
    }

    /// Boots a VM in place of a clone that has failed with `error`, for the container that the clone was made
    /// for.
    ///
    /// # Errors
    /// No VM can be booted, or the sandbox has ended. The clone has ended in any case.
    pub(super) async fn boot_instead(
        &self,
        container: &str,
        request: &VmRequest,
        clone: &mut AcquiredVm,
        error: &PodError,
    ) -> Result<(), PodError> {
        let mut state = self.state.lock().await;
        clone.vm.kill().await;
        clone._reservation = None;
        match &*state {
            SandboxState::Ended => return Err(PodError::PodEnded { id: container.to_owned() }),
            SandboxState::Running(running) => running.network_ended().await,
            SandboxState::Empty { .. } => {}
        }
        *state = SandboxState::Empty { warm_vm: None };
        let started = self.start_instead(request, error).await?;
        *clone = Self::run(&mut state, started, container, request);
        Ok(())
    }

    /// Connects the VM of a container with the container's network namespace, unless another container of the pod has
    /// done so. `named`: the configuration names the namespace; otherwise the container's own is connected if the pod has
    /// no other. `outside`: how the namespace is connected with the outside. `path`: how packets pass, which a further
    /// container need not say. Returns None if the namespace is not connected: it is the host's own, or such a further one.
    ///
    /// # Errors
    /// The VM has ended, another container has another namespace or connection, or the kernel refuses.
    pub(super) async fn connect(
        &self,
        container: &str,
        vm: &Vm,
        namespace: OwnedFd,
        named: bool,
        outside: Option<OutsideNetwork>,
        path: PacketPath,
    ) -> Result<Option<Arc<PodNetwork>>, PodError> {
        let mut state = self.state.lock().await;
        let running = match &mut *state {
            SandboxState::Running(running) if running.vm.pid() == vm.pid() => running,
            _ => return Err(PodError::Gone { id: container.to_owned() }),
        };
        if let Some(network) = &running.network {
            let other_path = path != PacketPath::default() && path != network.path();
            if other_path || outside.is_some() && network.outside() != outside.as_ref() {
                return Err(PodError::Network(NetworkError::OtherPorts));
            }
            let id = netns::id(&namespace).map_err(|error| PodError::Network(NetworkError::Enter(error)))?;
            return match network.id() == id {
                true => Ok(Some(Arc::clone(network))),
                false if named => Err(PodError::Network(NetworkError::OtherNamespace)),
                false => Ok(None),
            };
        }
        let network = PodNetwork::connect(vm, namespace, outside, path, Arc::clone(&self.settings.unclaimed))
            .await
            .map_err(PodError::Network)?;
        running.network.clone_from(&network);
        Ok(network)
    }

    fn run(state: &mut SandboxState, started: StartedVm, container: &str, request: &VmRequest) -> AcquiredVm {
        let StartedVm { vm, origin, has_disks, afterwards, reservation } = started;
        let mut users = VmUsers::default();
        users.enter(container);
        *state = SandboxState::Running(Box::new(RunningSandbox {
            vm: vm.clone(),
            requested: request.config.vm.clone(),
            afterwards,
            users,
            network: None,
            unsynced: false,
        }));
        AcquiredVm { vm, origin, has_disks, _reservation: Some(reservation) }
    }

    /// Ends a container's use of the VM. If the VM has no reason left to run, it ends too; nothing is left of
    /// it then. Otherwise `clear` removes from it what it has of the container.
    ///
    /// `synced`: everything that the container has written and that is still needed is safe on the host, so
    /// the VM has nothing to sync, unless an earlier container could not be removed. Does nothing for a
    /// container that does not use the VM.
    pub(super) async fn release(
        &self,
        container: &str,
        synced: bool,
        clear: impl Future<Output = Result<(), PodError>>,
    ) {
        let mut state = self.state.lock().await;
        let SandboxState::Running(running) = &mut *state else { return };
        match running.users.leave(container, self.settings.lifetime) {
            Departure::NoUser => {}
            Departure::VmStays => {
                if let Err(error) = clear.await {
                    tracing::warn!(id = container, "cannot clean up in the guest: {}", chain(&error));
                    running.unsynced = true;
                }
            }
            Departure::VmEnds => {
                let synced = synced && !running.unsynced;
                let exit =
                    if synced { running.vm.kill().await } else { running.vm.shutdown(SHUTDOWN_GRACE).await };
                tracing::debug!(id = container, "VM ended: {exit}");
                running.network_ended().await;
                *state = SandboxState::Empty { warm_vm: None };
            }
        }
    }

    /// Ends the VM, and with it all containers in it. No further VM starts.
    pub(super) async fn end(&self) {
        let ended = std::mem::replace(&mut *self.state.lock().await, SandboxState::Ended);
        match ended {
            SandboxState::Empty { warm_vm: Some(warm) } => _ = warm.vm.kill().await,
            SandboxState::Running(running) => {
                running.vm.kill().await;
                running.network_ended().await;
            }
            SandboxState::Empty { warm_vm: None } | SandboxState::Ended => {}
        }
    }

    /// The socket of containerd, if the pod's owner knows it.
    pub(super) fn containerd(&self) -> Option<&PathBuf> {
        self.settings.containerd.as_ref()
    }

    /// Whether the VM ends with the last container that uses it.
    pub(super) fn ends_with_containers(&self) -> bool {
        self.settings.lifetime == Lifetime::Containers
    }

    /// The VM that containers use, if there is one.
    pub(super) async fn vm(&self) -> Option<Vm> {
        match &*self.state.lock().await {
            SandboxState::Running(running) => Some(running.vm.clone()),
            SandboxState::Empty { .. } | SandboxState::Ended => None,
        }
    }
}

/// The containers that use a VM: those that are being created in it, and those that exist in its guest.
#[derive(Debug, Default)]
struct VmUsers(HashSet<String>);

/// What follows for the VM when a container leaves it.
#[derive(Debug, PartialEq, Eq)]
enum Departure {
    /// The container does not use this VM.
    NoUser,
    VmStays,
    VmEnds,
}

impl VmUsers {
    fn enter(&mut self, container: &str) {
        self.0.insert(container.to_owned());
    }

    fn leave(&mut self, container: &str, lifetime: Lifetime) -> Departure {
        if !self.0.remove(container) {
            return Departure::NoUser;
        }
        match lifetime {
            Lifetime::Containers if self.0.is_empty() => Departure::VmEnds,
            Lifetime::Containers | Lifetime::Sandbox => Departure::VmStays,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_ends_with_its_last_container() {
        let mut users = VmUsers::default();
        users.enter("a");
        users.enter("b");
        assert_eq!(users.leave("a", Lifetime::Containers), Departure::VmStays);
        assert_eq!(users.leave("a", Lifetime::Containers), Departure::NoUser);
        users.enter("a");
        assert_eq!(users.leave("b", Lifetime::Containers), Departure::VmStays);
        assert_eq!(users.leave("a", Lifetime::Containers), Departure::VmEnds);
    }

    #[test]
    fn the_vm_of_a_sandbox_outlives_its_containers() {
        let mut users = VmUsers::default();
        users.enter("a");
        assert_eq!(users.leave("a", Lifetime::Sandbox), Departure::VmStays);
        assert_eq!(users.leave("a", Lifetime::Sandbox), Departure::NoUser);
    }
}
