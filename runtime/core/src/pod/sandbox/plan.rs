//! Decides how the VM of a sandbox starts: with the warm VM, as a clone of a template, or by a boot.

use std::collections::HashMap;

use machinen_base::error::{ErrorKind, HasKind as _, chain};
use machinen_vm::{
    VmSpec,
    admission::{self, AdmissionError, HostMemory, Reservation},
    assets::Assets,
    template::{FoundTemplate, ReadyTemplate, TemplateError, TemplateShape, TemplateStore},
};
use tokio::task::spawn_blocking;

use super::{
    PodError, Sandbox,
    vm_spec::{self, ContainerLimits},
};
use crate::{
    config::{Config, TemplateMode},
    pool::{self, WarmVm},
    reservations_dir,
};

/// What a VM that boots takes of the host's memory until its container runs, MiB: all pages that it touches,
/// and the descriptions of its pages.
const BOOT_NEEDS: u64 = 160;
const BOOT_NEEDS_PER_GIB: u64 = 16;

/// What a container requires of its VM.
#[derive(Debug, Clone)]
pub(in crate::pod) struct VmRequest {
    /// With the container's annotations applied.
    pub(in crate::pod) config: Config,
    pub(in crate::pod) annotations: HashMap<String, String>,
    pub(in crate::pod) assets: Assets,
    pub(in crate::pod) limits: ContainerLimits,
}

/// How to start the VM of a sandbox.
#[derive(Debug)]
pub(super) struct VmPlan {
    pub(super) spec: VmSpec,
    pub(super) start: VmStart<Box<ShapedTemplate>>,
    pub(super) reservation: Reservation,
}

/// A template that can be cloned.
#[derive(Debug)]
pub(super) struct ShapedTemplate {
    pub(super) template: ReadyTemplate,
    pub(super) shape: TemplateShape,
}

/// Where the state of a VM comes from. `T` is a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmStart<T> {
    /// The warm VM, which is a clone of this template.
    Warm(T),
    Clone(T),
    Boot {
        /// A template is to be built of such a VM.
        build_template: bool,
    },
}

/// The result of a search for a template.
#[derive(Debug, Clone, Copy)]
enum TemplateSearch<T> {
    Ready(T),
    /// There is no template, and one could be built.
    Absent,
    /// Templates are not to be used, one is being built, building or cloning it has failed, or VMs of this
    /// kind cannot be cloned.
    Unusable,
}

/// Chooses how a VM starts. `is_warm`: whether the warm VM is a clone of this template.
fn choose<T>(mode: TemplateMode, found: TemplateSearch<T>, is_warm: impl FnOnce(&T) -> bool) -> VmStart<T> {
    match (mode, found) {
        (TemplateMode::Off, _) | (_, TemplateSearch::Unusable) => VmStart::Boot { build_template: false },
        (_, TemplateSearch::Ready(template)) if is_warm(&template) => VmStart::Warm(template),
        (_, TemplateSearch::Ready(template)) => VmStart::Clone(template),
        (TemplateMode::Auto, TemplateSearch::Absent) => VmStart::Boot { build_template: true },
        (TemplateMode::Use, TemplateSearch::Absent) => VmStart::Boot { build_template: false },
    }
}

/// What a start takes of the host's memory until its container runs, MiB.
fn memory_needs<T>(start: &VmStart<T>, memory_mib: u32) -> u64 {
    match start {
        VmStart::Warm(_) | VmStart::Clone(_) => admission::CLONE_NEEDS_MIB,
        VmStart::Boot { .. } => BOOT_NEEDS + BOOT_NEEDS_PER_GIB * u64::from(memory_mib).div_ceil(1024),
    }
}

impl Sandbox {
    /// Plans the VM for the first container.
    ///
    /// # Errors
    /// The configured accelerator does not work, or the host has too little memory.
    pub(super) async fn plan(
        &self,
        request: &VmRequest,
        warm_vm: Option<&WarmVm>,
    ) -> Result<VmPlan, PodError> {
        self.plan_in(request.config.template.mode, request, warm_vm).await
    }

    /// Plans a boot, without a template.
    ///
    /// # Errors
    /// As for [`Sandbox::plan`].
    pub(super) async fn plan_boot(&self, request: &VmRequest) -> Result<VmPlan, PodError> {
        self.plan_in(TemplateMode::Off, request, None).await
    }

    async fn plan_in(
        &self,
        mode: TemplateMode,
        request: &VmRequest,
        warm_vm: Option<&WarmVm>,
    ) -> Result<VmPlan, PodError> {
        let (settings, request) = (&self.settings, request.clone());
        let (name, namespace) = (settings.name.clone(), settings.namespace.clone());
        let warm = warm_vm.map(|warm| warm.shape.clone());
        let plan = move || match plan((&name, &namespace), &request, mode, warm.as_ref()) {
            Err(PodError::Admission(scarce)) if scarce.kind() == ErrorKind::ResourceExhausted => {
                give_way(&request.config, scarce)?;
                plan((&name, &namespace), &request, mode, warm.as_ref())
            }
            planned => planned,
        };
        spawn_blocking(plan).await.map_err(PodError::Worker)?
    }
}

/// Ends the clones of the warm pool, because a pod needs their memory. Blocks until they have ended.
///
/// # Errors
/// There are none: `scarce`, the reason for the call.
fn give_way(config: &Config, scarce: AdmissionError) -> Result<(), PodError> {
    match pool::drain(&config.pool.dir) {
        Ok(1..) => Ok(()),
        Ok(0) => Err(scarce.into()),
        Err(error) => {
            tracing::warn!("the warm pool keeps its memory: {}", chain(&error));
            Err(scarce.into())
        }
    }
}

/// Blocks.
fn plan(
    (name, namespace): (&str, &str),
    request: &VmRequest,
    mode: TemplateMode,
    warm: Option<&TemplateShape>,
) -> Result<VmPlan, PodError> {
    let host = HostMemory::now()?;
    let VmRequest { config, assets, limits, .. } = request;
    let spec = vm_spec::build((name, namespace), config, assets, *limits, host)?;
    let found = match mode {
        TemplateMode::Off => TemplateSearch::Unusable,
        TemplateMode::Use | TemplateMode::Auto => find_template(name, &spec, config),
    };
    let start = choose(mode, found, |found| warm == Some(&found.shape));
    let (needs, reserve) = (memory_needs(&start, spec.memory_mib), config.vm.memory_reserve_percent);
    let reservation = admission::admit(&reservations_dir(), needs, reserve, host)?;
    Ok(VmPlan { spec, start, reservation })
}

/// Searches for the template of a kind of VM. Without one that is trusted a VM boots, which reports its own
/// errors.
fn find_template(name: &str, spec: &VmSpec, config: &Config) -> TemplateSearch<Box<ShapedTemplate>> {
    let find = || -> Result<_, TemplateError> {
        let Some(shape) = TemplateShape::of(spec)? else { return Ok(None) };
        let found = TemplateStore::at(&config.template.dir).find(&shape)?;
        Ok(Some((found, shape)))
    };
    match find() {
        Ok(Some((FoundTemplate::Ready(template), shape))) => {
            TemplateSearch::Ready(Box::new(ShapedTemplate { template: *template, shape }))
        }
        Ok(Some((FoundTemplate::Absent, _))) => TemplateSearch::Absent,
        Ok(Some((FoundTemplate::Building, _)) | None) => TemplateSearch::Unusable,
        Ok(Some((FoundTemplate::Failed(reason), _))) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {reason}");
            TemplateSearch::Unusable
        }
        Err(error) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {}", chain(&error));
            TemplateSearch::Unusable
        }
    }
}

/// Checks whether the host has memory for one more VM, of the smallest size. Nothing is reserved.
///
/// # Errors
/// The host has too little memory.
pub fn admits_one_more(config: &Config) -> Result<(), AdmissionError> {
    let (needed, reserve) = (admission::CLONE_NEEDS_MIB, config.vm.memory_reserve_percent);
    admission::admit(&reservations_dir(), needed, reserve, HostMemory::now()?).map(drop)
}

/// Describes the VM of a container in a namespace of containerd's that has no annotations and no limits.
///
/// # Errors
/// The configured accelerator does not work here, or the host's memory cannot be read.
pub fn default_vm_spec(config: &Config, assets: &Assets, namespace: &str) -> Result<VmSpec, PodError> {
    Ok(vm_spec::build(
        ("template", namespace),
        config,
        assets,
        ContainerLimits::default(),
        HostMemory::now()?,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: VmStart<&str> = VmStart::Boot { build_template: false };
    const MODES: [TemplateMode; 3] = [TemplateMode::Off, TemplateMode::Use, TemplateMode::Auto];

    #[test]
    fn a_warm_vm_is_preferred_to_a_clone_and_a_clone_to_a_boot() {
        let ready = TemplateSearch::Ready("t");
        for mode in [TemplateMode::Use, TemplateMode::Auto] {
            assert_eq!(choose(mode, ready, |&template| template == "t"), VmStart::Warm("t"));
            assert_eq!(choose(mode, ready, |_| false), VmStart::Clone("t"));
        }
        assert_eq!(choose(TemplateMode::Off, ready, |_| true), BOOT);
    }

    #[test]
    fn a_template_is_built_only_if_it_is_missing_and_the_configuration_says_so() {
        for mode in MODES {
            let build_template = mode == TemplateMode::Auto;
            let absent: TemplateSearch<&str> = TemplateSearch::Absent;
            assert_eq!(choose(mode, absent, |_| true), VmStart::Boot { build_template });
            assert_eq!(choose(mode, TemplateSearch::Unusable, |_| true), BOOT);
        }
    }

    #[test]
    fn a_boot_needs_memory_for_the_descriptions_of_its_pages() {
        assert_eq!(memory_needs(&BOOT, 512), 160 + 16);
        assert_eq!(memory_needs(&BOOT, 1025), 160 + 32);
        assert_eq!(memory_needs(&VmStart::Clone("t"), 4096), admission::CLONE_NEEDS_MIB);
        assert_eq!(memory_needs(&VmStart::Warm("t"), 4096), admission::CLONE_NEEDS_MIB);
    }
}
