//! Runs a container's OCI hooks: programs of the operator, at fixed moments of the container's life.
//!
//! ```text
//!   create   prestart, createRuntime   in the host's namespaces     a failure undoes the creation
//!            createContainer           in those of the anchor       the same
//!   start    startContainer            in the guest (agent)         a failure ends the container
//!            poststart                 in the host's namespaces     a failure is logged
//!   delete   poststop                  in the host's namespaces     a failure is logged
//! ```
//! docs/design/hooks.md explains the choices. `record.rs` keeps the poststop hooks for the time after this process was
//! killed.

mod error;
mod execute;
mod output;
mod record;
mod state;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use machinen_protocol::HOOK_PATIENCE;
use oci_spec::runtime::{ContainerState, Hook, Hooks, Spec};

use execute::HookPlace;
use state::HookState;

pub use error::{HookError, HookFailure};
pub use record::{PoststopRecord, recorded};

/// The lists of hooks that run on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookStage {
    /// At the end of a creation. Older than [`HookStage::CreateRuntime`], with the same meaning.
    Prestart,
    /// At the end of a creation, in the namespaces of the host.
    CreateRuntime,
    /// At the end of a creation, in the namespaces of the container.
    CreateContainer,
    /// After the start of the container's command.
    Poststart,
    /// After the container has been removed.
    Poststop,
}

impl fmt::Display for HookStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

/// The hooks of one container that run on the host, and what they are told.
#[derive(Debug, Clone, Default)]
pub struct ContainerHooks {
    hooks: Hooks,
    state: HookState,
    /// How long the hooks that the guest runs may take.
    in_guest: Duration,
}

impl ContainerHooks {
    /// `spec` is the guest's part of the configuration, without the hooks in `hooks`.
    pub fn new(
        hooks: Hooks,
        spec: &Spec,
        id: &str,
        bundle: &Path,
        annotations: HashMap<String, String>,
    ) -> Self {
        let in_guest = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
        let in_guest =
            in_guest.unwrap_or_default().iter().map(patience).fold(Duration::ZERO, Duration::saturating_add);
        Self { hooks, state: HookState::new(id, bundle, annotations), in_guest }
    }

    /// What the guest passes to its hooks, but for the pid of the container's init.
    ///
    /// # Errors
    /// The state cannot be encoded.
    pub fn state_for_guest(&self) -> Result<Vec<u8>, HookError> {
        match self.in_guest.is_zero() {
            true => Ok(Vec::new()),
            false => self.state.json(ContainerState::Created, None),
        }
    }

    /// How long the hooks that the guest runs may take.
    pub fn time_in_guest(&self) -> Duration {
        self.in_guest
    }

    /// Records the poststop hooks in `dir`, and then runs the hooks of a creation in their order. `anchor` is the pid
    /// that stands for the container, and `cgroups` are the groups in which the hooks run; if empty, those of this
    /// process.
    ///
    /// # Errors
    /// The first hook that fails; those after it do not run.
    pub async fn run_at_create(&self, anchor: u32, cgroups: &[PathBuf], dir: &Path) -> Result<(), HookError> {
        if let Some(hooks) = self.hooks.poststop().clone().filter(|hooks| !hooks.is_empty()) {
            let state = self.state.json(ContainerState::Stopped, None)?;
            record::write(dir, self.state.id(), self.state.bundle(), &state, hooks)?;
        }
        let state = self.state.json(ContainerState::Creating, Some(anchor))?;
        let host = HookPlace { dir: self.state.bundle(), cgroups, namespaces_of: None };
        let container = HookPlace { namespaces_of: Some(anchor), ..host };
        for (stage, hooks, place) in [
            (HookStage::Prestart, self.hooks.prestart(), &host),
            (HookStage::CreateRuntime, self.hooks.create_runtime(), &host),
            (HookStage::CreateContainer, self.hooks.create_container(), &container),
        ] {
            for (number, hook) in hooks.iter().flatten().enumerate() {
                run(stage, number, hook, place, &state, None).await?;
            }
        }
        Ok(())
    }

    /// Runs the poststart hooks. Returns the failures, each of which leaves the others and the container alone.
    pub async fn run_at_start(&self, anchor: u32, cgroups: &[PathBuf]) -> Vec<HookError> {
        let hooks = self.hooks.poststart().as_deref().unwrap_or_default();
        if hooks.is_empty() {
            return Vec::new();
        }
        let state = match self.state.json(ContainerState::Running, Some(anchor)) {
            Ok(state) => state,
            Err(error) => return vec![error],
        };
        let place = HookPlace { dir: self.state.bundle(), cgroups, namespaces_of: None };
        let mut failures = Vec::new();
        for (number, hook) in hooks.iter().enumerate() {
            failures.extend(run(HookStage::Poststart, number, hook, &place, &state, None).await.err());
        }
        failures
    }
}

/// Runs one hook to its end, but not beyond `until`.
async fn run(
    stage: HookStage,
    number: usize,
    hook: &Hook,
    place: &HookPlace<'_>,
    state: &[u8],
    until: Option<Instant>,
) -> Result<(), HookError> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let limit = left.map_or(patience(hook), |left| left.min(patience(hook)));
    let ended = execute::execute(hook, place, state, limit).await;
    ended.map_err(|source| HookError::Failed { stage, number, path: hook.path().clone(), source })
}

/// How long a hook may take.
fn patience(hook: &Hook) -> Duration {
    let seconds = hook.timeout().and_then(|timeout| u64::try_from(timeout).ok());
    seconds.map_or(HOOK_PATIENCE, Duration::from_secs)
}

#[cfg(test)]
mod tests;
