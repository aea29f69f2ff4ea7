//! When a pod enters and limits its cgroup on the host.

use machinen_vm::VmExit;

use super::{
    Pod, PodError,
    create::CreatePlan,
    sandbox::{self, AcquiredVm, VmOrigin},
};

impl Pod {
    /// Moves this process to the cgroup of the pod's first container, unless it is in there.
    pub(super) async fn enter_cgroup(&self, plan: &CreatePlan) -> Result<(), PodError> {
        let path = plan.guest.cgroups_path.as_deref();
        Ok(self.shared.cgroup.enter(path, &self.shared.name, &self.shared.state_dir).await?)
    }

    /// Extends the limits on the host for a container that exists in the guest and does not run yet.
    pub(super) async fn limit_on_host(
        &self,
        id: &str,
        plan: &CreatePlan,
        vm: &AcquiredVm,
    ) -> Result<(), PodError> {
        let is_clone = Some(vm.origin.is_clone()).filter(|_| vm.origin != VmOrigin::Pod);
        let resources = plan.guest.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let vm_mib = vm.vm.spec().memory_mib;
        let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit()).unwrap_or(0);
        if memory >> 20 > i64::from(vm_mib) {
            tracing::warn!(
                id,
                "the limit of memory is {} MiB, but the pod's VM has {vm_mib} MiB, because the pod was created without limits: \
                 io.machinen.memory-ceiling gives it more",
                memory >> 20
            );
        }
        let overhead = sandbox::host_overhead_mib(&plan.config.vm, vm.vm.spec());
        Ok(self.shared.cgroup.limit(id, resources, overhead, is_clone).await?)
    }

    /// Lowers the limits on the host after a container was removed or could not be created. Leaves the cgroup
    /// if no container is left, unless the VM outlives the containers.
    pub(super) async fn release_cgroup(&self, id: &str) {
        let is_last = || self.is_empty() && self.shared.sandbox.ends_with_containers();
        self.shared.cgroup.release(id, is_last).await;
    }

    /// Why a VM was lost, and whether the host's kernel has ended it for lack of memory. The count of the cgroup says
    /// so: the exit of a QEMU that the kernel kills can look as if the shim had asked for it, because the channel to the
    /// guest ends before the process.
    pub(super) async fn reason_of_loss(&self, exit: VmExit) -> (String, bool) {
        match self.shared.cgroup.out_of_memory().await {
            Some(group) => (
                format!(
                    "the host's kernel has killed QEMU, because the memory of the cgroup {group} was used up"
                ),
                true,
            ),
            None => (exit.to_string(), false),
        }
    }
}
