//! When a container's hooks run on the host, and in which cgroup.

use super::{Container, ContainerId, Pod, PodError, leftovers::POSTSTOP_DIR};
use crate::hooks::{ContainerHooks, HookError, PoststopRecord};
use machinen_base::error::chain;

impl Pod {
    /// Runs the hooks of a creation. The container exists and waits, and `anchor` stands for it.
    pub(super) async fn run_create_hooks(&self, hooks: &ContainerHooks, anchor: u32) -> Result<(), PodError> {
        let cgroups = self.shared.cgroup.home().await;
        Ok(hooks.run_at_create(anchor, &cgroups, &self.shared.state_dir.join(POSTSTOP_DIR)).await?)
    }

    /// Runs the poststart hooks of a container that runs.
    pub(super) async fn run_poststart_hooks(&self, container: &Container) {
        let cgroups = self.shared.cgroup.home().await;
        for error in container.hooks.run_at_start(container.pid, &cgroups).await {
            tracing::warn!(id = container.id.as_str(), "{}", chain(&error));
        }
    }

    /// Runs the poststop hooks of a container of which nothing is left, if its hooks have begun. They run to their end,
    /// even if the caller does not wait for that.
    pub(super) async fn run_poststop_hooks(&self, id: &ContainerId) {
        let (pod, id) = (self.clone(), id.clone());
        let run = async move {
            match pod.run_recorded(&id).await {
                Ok(failures) => {
                    failures.iter().for_each(|error| tracing::warn!(id = id.as_str(), "{}", chain(error)));
                }
                Err(error) => tracing::error!(id = id.as_str(), "{}", chain(&error)),
            }
        };
        if let Err(error) = tokio::spawn(run).await {
            tracing::error!("the poststop hooks of a container were given up: {error}");
        }
    }

    async fn run_recorded(&self, id: &ContainerId) -> Result<Vec<HookError>, HookError> {
        match PoststopRecord::open(&self.shared.state_dir.join(POSTSTOP_DIR), id.as_str())? {
            Some(record) => record.run(&self.shared.cgroup.home().await, None).await,
            None => Ok(Vec::new()),
        }
    }
}
