//! Starts the VM of a sandbox as planned.
//!
//! A warm VM or a clone that fails is not an error: the next way to start a VM is tried, and the log has one
//! line about it. The first start of a kind of VM also requests a template, but only once its container runs,
//! so that building the template does not delay the start.

use std::time::Duration;

use machinen_base::error::chain;
use machinen_vm::{
    SlotDisks, Vm, VmSpec,
    admission::Reservation,
    template::{TemplateShape, TemplateStore},
};
use tokio::task::spawn_blocking;

use super::{
    PodError, Sandbox, VmOrigin,
    afterwards::Afterwards,
    plan::{ShapedTemplate, VmPlan, VmRequest, VmStart},
};
use crate::pool::WarmVm;

/// A clone answers within a tenth of a second. One that has not answered by now has failed, and a VM boots
/// instead.
const CLONE_TIMEOUT: Duration = Duration::from_secs(20);

/// A VM that was started for a container.
#[derive(Debug)]
pub(super) struct StartedVm {
    pub(super) vm: Vm,
    pub(super) origin: VmOrigin,
    /// The VM has the disks of its first container already.
    pub(super) has_disks: bool,
    pub(super) afterwards: Afterwards,
    pub(super) reservation: Reservation,
}

impl Sandbox {
    /// Starts the VM of `plan`. The warm VM is ended if the plan does not use it. A clone waits for `disks` and starts with
    /// them.
    ///
    /// # Errors
    /// No VM can be booted either.
    pub(super) async fn start(
        &self,
        plan: VmPlan,
        warm_vm: Option<WarmVm>,
        request: &VmRequest,
        disks: impl Future<Output = Option<SlotDisks>>,
    ) -> Result<StartedVm, PodError> {
        let VmPlan { spec, start, reservation } = plan;
        let (template, warm_fits) = match start {
            VmStart::Warm(template) => (template, true),
            VmStart::Clone(template) => (template, false),
            VmStart::Boot { build_template } => {
                self.give_up_warm_vm(warm_vm).await;
                let afterwards = if build_template {
                    Afterwards::BuildTemplate(spec.clone())
                } else {
                    Afterwards::Nothing
                };
                return self.launch(spec, afterwards, reservation).await;
            }
        };
        let refill = (self.settings.config.pool.size > 0).then(|| spec.clone());
        let afterwards = Afterwards::Cloned { template: template.shape.key(), refill };
        if !warm_fits {
            self.give_up_warm_vm(warm_vm).await;
        } else if let Some(WarmVm { vm, .. }) = warm_vm {
            let vm = vm.configured_as(spec.hostname);
            return Ok(StartedVm { vm, origin: VmOrigin::Warm, has_disks: false, afterwards, reservation });
        }
        let ShapedTemplate { template, shape } = *template;
        let spec = VmSpec { boot_timeout: spec.boot_timeout.min(CLONE_TIMEOUT), ..spec };
        let disks = disks.await;
        let has_disks = disks.is_some();
        match Vm::restore(spec, &self.settings.dir, &template.snapshot, disks).await {
            Ok(vm) => Ok(StartedVm { vm, origin: VmOrigin::Clone, has_disks, afterwards, reservation }),
            Err(error) => {
                drop((template, reservation));
                self.lose_clone(request, shape, chain(&error)).await;
                self.boot(request).await
            }
        }
    }

    /// Boots a VM because a clone has failed with `error`.
    ///
    /// # Errors
    /// The host has too little memory, or QEMU does not start.
    pub(super) async fn start_instead(
        &self,
        request: &VmRequest,
        error: &PodError,
    ) -> Result<StartedVm, PodError> {
        let VmPlan { start, reservation, .. } = self.plan(request, None).await?;
        drop(reservation);
        if let VmStart::Warm(template) | VmStart::Clone(template) = start {
            self.lose_clone(request, template.shape, chain(error)).await;
        }
        self.boot(request).await
    }

    async fn boot(&self, request: &VmRequest) -> Result<StartedVm, PodError> {
        let VmPlan { spec, reservation, .. } = self.plan_boot(request).await?;
        self.launch(spec, Afterwards::Nothing, reservation).await
    }

    async fn launch(
        &self,
        spec: VmSpec,
        afterwards: Afterwards,
        reservation: Reservation,
    ) -> Result<StartedVm, PodError> {
        let vm = Vm::launch(spec, &self.settings.dir).await.map_err(PodError::Boot)?;
        Ok(StartedVm { vm, origin: VmOrigin::Boot, has_disks: false, afterwards, reservation })
    }

    async fn give_up_warm_vm(&self, warm_vm: Option<WarmVm>) {
        if let Some(WarmVm { vm, .. }) = warm_vm {
            tracing::info!(
                pod = self.settings.name,
                "the warm VM is not used: the container needs a different one"
            );
            vm.kill().await;
        }
    }

    /// Records that a clone did not become ready. Later starts clone again, unless that happens time after time.
    async fn lose_clone(&self, request: &VmRequest, shape: TemplateShape, reason: String) {
        tracing::warn!(pod = self.settings.name, "a clone was lost, booting instead: {reason}");
        let templates = TemplateStore::at(&request.config.template.dir);
        match spawn_blocking(move || templates.clone_lost(&shape, &reason)).await {
            Ok(Ok(true)) => {
                tracing::warn!(pod = self.settings.name, "the template is put aside: its clones are lost");
            }
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => tracing::warn!("{}", chain(&error)),
        }
    }
}
