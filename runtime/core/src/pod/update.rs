//! Changes the limits of a running container.

use oci_spec::runtime::LinuxResources;

use super::{ContainerId, Pod, PodError, state::PodRequest};
use crate::spec::resources::{self, CurrentLimits};

impl Pod {
    /// Sets limits of a container, all or none of them. `json` is the runtime-spec's LinuxResources.
    ///
    /// # Errors
    /// The container does not exist or has stopped, the limits are not valid, they are beyond what the VM was started
    /// with or below what the container uses, or the guest lacks or refuses one of them.
    pub async fn update(&self, id: &ContainerId, json: &[u8]) -> Result<(), PodError> {
        let container = self.container(id)?;
        container.check(PodRequest::Update)?;
        let wanted: LinuxResources =
            resources::parse(json).map_err(|source| PodError::Resources { source })?;
        let agent = self.agent(id).await?;
        let failed = |source| PodError::guest("update", id, source);
        let files = ["cpu.max", "memory.max", "memory.current", "memory.stat"];
        let now = agent.read_cgroup(id, &files).await.map_err(failed)?;
        let others_memory = self.shared.cgroup.memory_of_others(id).await;
        let content =
            |name| now.iter().find(|file| file.name == name).map_or("", |file| file.content.as_str());
        let now = CurrentLimits {
            cpu_max: content("cpu.max"),
            memory_max: content("memory.max"),
            memory_current: content("memory.current"),
            memory_stat: content("memory.stat"),
            others_memory,
            vm_memory_mib: container.vm.spec().memory_mib,
            vcpus: container.vm.spec().vcpus,
        };
        let writes = resources::writes(&wanted, now)?;
        if writes.is_empty() {
            return Ok(());
        }
        // A limit that grows is raised on the host before the guest relies on it, and one that shrinks is lowered there
        // after the guest keeps to it.
        let widened = self.shared.cgroup.widen(id, &wanted).await?;
        let written = agent.write_cgroup(id, writes).await.map_err(failed);
        self.shared.cgroup.narrow(widened, written.is_ok()).await?;
        written
    }
}
