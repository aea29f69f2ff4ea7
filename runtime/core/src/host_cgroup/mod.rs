//! The cgroup of a pod on the host, which bounds its shim, its VM and all other processes of the pod.
//!
//! ```text
//!   VM starts            enters linux.cgroupsPath of the bundle      every later child inherits it
//!   container created    limits = sum of the containers' + allowance (limits.rs)
//!   container updated    wider limits first on the host, narrower ones first in the guest
//!   last one deleted     the shim returns to the groups it came from, and removes the empty group
//! ```
//! A container's own limits are enforced in the guest; the host's cgroup bounds a guest that ignores them. A pod of a shim
//! whose first container has no cgroupsPath stays where the shim is, without limits of its own; the OCI command line has a
//! default group.

mod error;
mod host;
mod limits;
mod membership;
mod path;
mod scope;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use machinen_base::{error::chain, owner};
use oci_spec::runtime::LinuxResources;
use tokio::{sync::Mutex, task::spawn_blocking, time::sleep};

use crate::spec::cpus::CpuSet;
use limits::{ContainerLimits, HostLimits, VmNeeds};
use membership::JoinedCgroup;

pub use error::HostCgroupError;
pub use host::HostCgroups;
pub use membership::remove_abandoned;
pub use path::{CgroupPath, CgroupPathError};
pub use scope::ScopeError;

/// A guest gives back memory that it has freed some seconds after it has freed it. A lower limit of memory takes effect
/// step by step during this time, so that it does not end an honest guest.
const STEP: Duration = Duration::from_secs(2);
const STEPS: u32 = 15;

/// The cgroup of one pod. Clones are handles of the same.
#[derive(Debug, Clone)]
pub struct HostCgroup {
    /// The group of a pod whose first container names none.
    default: Option<PathBuf>,
    state: Arc<Mutex<CgroupState>>,
}

#[derive(Debug)]
struct CgroupState {
    /// The pod's first container has decided about the cgroup.
    decided: bool,
    joined: Option<Arc<JoinedCgroup>>,
    containers: HashMap<String, ContainerLimits>,
    needs: VmNeeds,
    /// What the containers' limits add up to.
    wanted: HostLimits,
    /// What the cgroup has.
    applied: HostLimits,
}

impl Default for CgroupState {
    fn default() -> Self {
        Self {
            decided: false,
            joined: None,
            containers: HashMap::new(),
            needs: VmNeeds { overhead: 0, vms: 1, are_clones: false },
            wanted: HostLimits::default(),
            applied: HostLimits::default(),
        }
    }
}

/// An update of a container's limits, of which the host has the wider ones.
#[derive(Debug)]
pub struct WidenedLimits {
    id: String,
    before: ContainerLimits,
}

impl HostCgroup {
    /// The cgroup of a pod that is in none yet. `default` is used if the first container names no other, and can be made.
    pub fn new(default: Option<PathBuf>) -> Self {
        Self { default, state: Arc::default() }
    }

    /// Moves this process and its children to the cgroup `path`, if this is the pod's first container. Children that are
    /// started meanwhile are moved too. `state_dir` gets a record for [`remove_abandoned`].
    ///
    /// # Errors
    /// The path is refused, or the cgroup cannot be made. This process is where it was then.
    pub async fn enter(
        &self,
        path: Option<&Path>,
        id: &str,
        state_dir: &Path,
    ) -> Result<(), HostCgroupError> {
        let named = path.filter(|path| !path.as_os_str().is_empty());
        let path = named.or(self.default.as_deref()).map(CgroupPath::parse).transpose()?;
        // The cgroups of the host are not an ordinary user's, unless they were delegated to it.
        let is_optional = named.is_none() || owner::user().is_some();
        let (cgroup, id, state_dir) = (self.clone(), id.to_owned(), state_dir.to_owned());
        // A task of its own, because a caller that gives up must not leave this process in a group that is forgotten.
        let entered = tokio::spawn(async move { cgroup.enter_once(path, is_optional, id, state_dir).await });
        entered.await.map_err(HostCgroupError::Worker)?
    }

    async fn enter_once(
        &self,
        path: Option<CgroupPath>,
        is_optional: bool,
        id: String,
        state_dir: PathBuf,
    ) -> Result<(), HostCgroupError> {
        let mut state = self.state.lock().await;
        if state.decided {
            return Ok(());
        }
        let Some(path) = path else {
            state.decided = true;
            return Ok(());
        };
        let joined = match blocking(move || JoinedCgroup::enter(&path, &id, &state_dir)).await {
            Ok(joined) => joined,
            Err(error) if is_optional => {
                tracing::warn!("limits hold in the guest only: {}", chain(&error));
                state.decided = true;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        tracing::debug!("entered the cgroup {} of the host", joined.path());
        *state = CgroupState { decided: true, joined: Some(Arc::new(joined)), ..CgroupState::default() };
        Ok(())
    }

    /// Sets the limits that the host has with one more container, whose VM needs `overhead` MiB in addition.
    /// `is_clone` is whether the VM is a clone of a template, if the VM was made for this container.
    ///
    /// # Errors
    /// The kernel refuses a limit.
    pub async fn limit(
        &self,
        id: &str,
        resources: Option<&LinuxResources>,
        overhead: u64,
        is_clone: Option<bool>,
    ) -> Result<(), HostCgroupError> {
        let mut state = self.state.lock().await;
        state.needs.overhead = overhead << 20;
        state.needs.are_clones = is_clone.unwrap_or(state.needs.are_clones);
        state.containers.insert(id.to_owned(), ContainerLimits::of(resources));
        self.apply(&mut state).await
    }

    /// The sum of the limits of memory of the pod's containers other than `id`, bytes.
    pub async fn memory_of_others(&self, id: &str) -> u64 {
        let state = self.state.lock().await;
        let others = state.containers.iter().filter(|(other, _)| *other != id);
        others.filter_map(|(_, limits)| limits.memory()).fold(0, u64::saturating_add)
    }

    /// Widens the limits for an update that widens those of a container. [`HostCgroup::narrow`] completes the update
    /// when the guest has it.
    ///
    /// # Errors
    /// The kernel refuses a limit. The limits are unchanged then.
    pub async fn widen(&self, id: &str, change: &LinuxResources) -> Result<WidenedLimits, HostCgroupError> {
        let mut state = self.state.lock().await;
        let before = state.containers.get(id).cloned().unwrap_or_default();
        let narrow = state.sum();
        state.containers.insert(id.to_owned(), before.updated(change));
        let both = state.sum().or_more(&narrow);
        let widened = state.write(both).await;
        if widened.is_err() {
            state.containers.insert(id.to_owned(), before.clone());
        }
        widened.map(|()| WidenedLimits { id: id.to_owned(), before })
    }

    /// Narrows the limits to the sum of the containers', after an update of the guest that has succeeded or failed.
    ///
    /// # Errors
    /// The kernel refuses a limit.
    pub async fn narrow(&self, widened: WidenedLimits, updated: bool) -> Result<(), HostCgroupError> {
        let mut state = self.state.lock().await;
        if !updated {
            state.containers.insert(widened.id, widened.before);
        }
        self.apply(&mut state).await
    }

    /// Sets how many VMs the pod has at the same time. Each needs memory.
    pub async fn set_vms(&self, vms: u64) {
        let mut state = self.state.lock().await;
        state.needs.vms = vms;
        if let Err(error) = self.apply(&mut state).await {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Lowers the limits after a container was removed. If it was the last one (`is_last`, asked while no other
    /// container can enter), this process leaves the cgroup, which is removed.
    pub async fn release(&self, id: &str, is_last: impl FnOnce() -> bool) {
        let mut state = self.state.lock().await;
        let removed = state.containers.remove(id);
        if !is_last() {
            if removed.is_some()
                && let Err(error) = self.apply(&mut state).await
            {
                tracing::warn!(id, "{}", chain(&error));
            }
            return;
        }
        let Some(joined) = std::mem::take(&mut *state).joined else { return };
        // No other handle exists: all others are made and dropped while the state is locked.
        let Some(joined) = Arc::into_inner(joined) else { return };
        if let Err(error) = blocking(move || joined.leave()).await {
            tracing::warn!(id, "{}", chain(&error));
        }
    }

    /// The name of the cgroup, if the host's kernel has killed a process in it for lack of memory.
    pub async fn out_of_memory(&self) -> Option<String> {
        let state = self.state.lock().await;
        let joined = state.joined.as_ref()?;
        (joined.kills_since_entry() > 0).then(|| joined.path().to_string())
    }

    /// The groups that this process came from, for processes that outlive the pod. Empty: this process is in them.
    pub async fn home(&self) -> Vec<PathBuf> {
        let state = self.state.lock().await;
        state.joined.as_ref().map(|joined| joined.home().to_vec()).unwrap_or_default()
    }

    /// Applies the sum of the containers' limits.
    async fn apply(&self, state: &mut CgroupState) -> Result<(), HostCgroupError> {
        let wanted = state.sum();
        state.wanted = wanted.clone();
        let unsettled = state.wants_less_memory();
        state.write(state.with_room(wanted)).await?;
        if !unsettled && state.wants_less_memory() {
            tokio::spawn(self.clone().settle());
        }
        Ok(())
    }

    /// Lowers the limit of memory as the guest gives memory back. In the end the limit holds, whatever the guest does.
    async fn settle(self) {
        for step in 1..=STEPS {
            sleep(STEP).await;
            let mut state = self.state.lock().await;
            if state.joined.is_none() || !state.wants_less_memory() {
                return;
            }
            let wanted = state.wanted.clone();
            let limits = if step < STEPS { state.with_room(wanted) } else { wanted };
            if let Err(error) = state.write(limits).await {
                tracing::warn!("cannot lower the limit of memory yet: {}", chain(&error));
            }
        }
    }
}

impl CgroupState {
    fn sum(&self) -> HostLimits {
        HostLimits::of(&self.containers.values().collect::<Vec<_>>(), self.needs)
    }

    fn wants_less_memory(&self) -> bool {
        self.wanted.memory.zip(self.applied.memory).is_some_and(|(wanted, applied)| wanted < applied)
    }

    /// The limits, with a limit of memory that leaves room for what is in use.
    fn with_room(&self, limits: HostLimits) -> HostLimits {
        let used = self.joined.as_ref().and_then(|joined| joined.pinned_memory()).unwrap_or(0);
        let room = used.saturating_add(used / 8);
        limits.with_room(self.applied.memory.map_or(room, |applied| room.min(applied)))
    }

    async fn write(&mut self, limits: HostLimits) -> Result<(), HostCgroupError> {
        let Some(joined) = self.joined.clone() else { return Ok(()) };
        let Some(changes) = limits.changes(&self.applied, &online_cpus()) else { return Ok(()) };
        blocking(move || joined.apply(&changes)).await?;
        self.applied = limits;
        Ok(())
    }
}

/// The CPUs of the host that run. A host whose list cannot be read has at least the first.
fn online_cpus() -> CpuSet {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    CpuSet::parse(&text).unwrap_or_else(|| CpuSet::parse("0").expect("a number"))
}

/// Runs system calls that may take some time, away from the event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostCgroupError> + Send + 'static,
) -> Result<T, HostCgroupError> {
    spawn_blocking(work).await.map_err(HostCgroupError::Worker)?
}
