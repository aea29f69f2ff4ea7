//! What is left to do for later starts when a container runs, so that it does not delay this start.

use std::{path::PathBuf, sync::Arc};

use machinen_base::error::chain;
use machinen_vm::{VmSpec, template::TemplateStore};
use tokio::task::spawn_blocking;

use super::{Sandbox, SandboxState};
use crate::{
    config::TemplateConfig,
    pool::{self, MemberRequest, Pool, PoolError},
};

/// What a new VM leaves to be done when its first container runs.
#[derive(Debug, Default)]
pub(super) enum Afterwards {
    #[default]
    Nothing,
    /// The VM is a clone.
    Cloned {
        /// The key of its template, which works.
        template: String,
        /// The warm pool is to be refilled with clones of this kind.
        refill: Option<VmSpec>,
    },
    /// A VM of this kind was booted because it has no template; one is to be built.
    BuildTemplate(VmSpec),
}

impl Sandbox {
    /// Starts the work for later starts, because a container of the sandbox runs. A failure is logged.
    ///
    /// The processes outlive the pod, and so belong to the cgroups `home`.
    pub(in crate::pod) async fn work_ahead(&self, home: &[PathBuf]) {
        let afterwards = match &mut *self.state.lock().await {
            SandboxState::Running(running) => std::mem::take(&mut running.afterwards),
            SandboxState::Empty { .. } | SandboxState::Ended => Afterwards::Nothing,
        };
        match afterwards {
            Afterwards::Nothing => {}
            Afterwards::Cloned { template, refill } => {
                if let Err(error) =
                    TemplateStore::at(&self.settings.config.template.dir).clone_works(&template)
                {
                    tracing::warn!("{}", chain(&error));
                }
                if let Some(Err(error)) = refill.map(|spec| self.refill_pool(spec, home)) {
                    tracing::warn!("{}", chain(&error));
                }
            }
            Afterwards::BuildTemplate(spec) => {
                let TemplateConfig { dir, budget_mib, .. } = &self.settings.config.template;
                let config = Arc::clone(&self.settings.config);
                let disks = match spawn_blocking(move || pool::warm_up::disks(&config)).await {
                    Ok(Ok(disks)) => Some(disks),
                    Ok(Err(error)) => {
                        tracing::warn!("a template is built without a container: {}", chain(&error));
                        None
                    }
                    Err(error) => {
                        tracing::warn!("a template is built without a container: {error}");
                        None
                    }
                };
                if let Err(error) = TemplateStore::at(dir).request(&spec, *budget_mib, home, disks) {
                    tracing::warn!("{}", chain(&error));
                }
            }
        }
    }

    /// Requests further clones like this VM from the warm pool.
    fn refill_pool(&self, spec: VmSpec, home: &[PathBuf]) -> Result<(), PoolError> {
        if let Err(error) = pool::has_room(&self.settings.config) {
            tracing::debug!("no clone is kept ready: {}", chain(&error));
            return Ok(());
        }
        let containerd = self.settings.containerd.clone();
        let request = MemberRequest { spec, containerd, cgroups: home.to_vec() };
        match Pool::of(&self.settings.config)? {
            Some(pool) => pool.refill(&request),
            None => Ok(()),
        }
    }
}
