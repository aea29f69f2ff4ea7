//! Provides the VM of a pod: a clone of a template if there is one, otherwise a VM that boots.
//!
//! A clone that fails is not an error: a VM boots instead, and the log has one line about it. The first start
//! of a kind of VM also requests a template, but only once its container runs, so that building the template
//! does not delay the start.

use std::{fmt, path::PathBuf, time::Duration};

use machinen_base::error::chain;
use machinen_vm::{
    Vm, VmSpec,
    admission::{self, AdmissionError, HostMemory, Reservation},
    assets::Assets,
    template::{FoundTemplate, ReadyTemplate, TemplateShape, TemplateStore},
};
use oci_spec::runtime::Spec;
use tokio::task::spawn_blocking;

use super::{DescribedVm, Pod, PodError, create::CreatePlan, vm_spec};
use crate::{
    config::{self, annotations},
    pool::{self, Pool, WarmVm},
    reservations_dir,
};

/// What a VM that boots takes of the host's memory until its container runs, MiB: all pages that it touches, and the
/// descriptions of its pages.
const BOOT_NEEDS: u64 = 160;
const BOOT_NEEDS_PER_GIB: u64 = 16;

/// A clone answers within a tenth of a second. One that has not answered by now has failed, and a VM boots
/// instead.
const CLONE_TIMEOUT: Duration = Duration::from_secs(20);

/// The VM for a container that is being created.
#[derive(Debug)]
pub(super) struct Provisioned {
    pub(super) vm: Vm,
    pub(super) origin: VmOrigin,
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

/// What is left to do when the first container runs, so that it does not delay the start.
#[derive(Debug, Default)]
pub(super) struct Afterwards {
    /// The VM is a clone of this kind, and the warm pool is to be refilled with such clones.
    refill: Option<VmSpec>,
    /// A VM of this kind was booted because it has no template; one is to be built.
    build: Option<VmSpec>,
}

/// How to start the VM of a pod.
#[derive(Debug)]
struct VmPlan {
    spec: VmSpec,
    from: StartFrom,
    reservation: Reservation,
}

#[derive(Debug)]
enum StartFrom {
    Template(Box<(ReadyTemplate, TemplateShape)>),
    Boot { request_template: bool },
}

impl Pod {
    /// Returns the pod's VM, which is starting if this is the pod's first container.
    ///
    /// # Errors
    /// No VM can be started, or the container's annotations require another VM than the one that runs.
    pub(super) async fn provision(&self, create: &CreatePlan) -> Result<Provisioned, PodError> {
        let mut slot = self.shared.vm.lock().await;
        if let Some(vm) = &*slot {
            if let Some(DescribedVm { spec, requested }) = &*self.described_vm() {
                annotations::check_join(&create.config, &create.annotations, requested, spec)?;
            }
            return Ok(Provisioned { vm: vm.clone(), origin: VmOrigin::Pod, _reservation: None });
        }
        let plan = self.plan_vm(create, create.config.template.mode).await?;
        if let StartFrom::Template(_) = &plan.from
            && self.shared.config.pool.size > 0
        {
            self.afterwards().refill = Some(plan.spec.clone());
        }
        if let Some(vm) = self.matching_warm_vm(&plan).await {
            *slot = Some(vm.clone());
            return Ok(Provisioned { vm, origin: VmOrigin::Warm, _reservation: Some(plan.reservation) });
        }
        let provisioned = match plan {
            VmPlan { mut spec, from: StartFrom::Template(found), reservation } => {
                let (template, shape) = *found;
                spec.boot_timeout = spec.boot_timeout.min(CLONE_TIMEOUT);
                match Vm::restore(spec, &self.shared.dir, &template.snapshot).await {
                    Ok(vm) => Provisioned { vm, origin: VmOrigin::Clone, _reservation: Some(reservation) },
                    Err(error) => {
                        self.discard_template(create, shape, chain(&error)).await;
                        self.boot(create).await?
                    }
                }
            }
            VmPlan { spec, from: StartFrom::Boot { request_template }, reservation } => {
                if request_template {
                    self.afterwards().build = Some(spec.clone());
                }
                let vm = Vm::launch(spec, &self.shared.dir).await.map_err(PodError::Boot)?;
                Provisioned { vm, origin: VmOrigin::Boot, _reservation: Some(reservation) }
            }
        };
        *slot = Some(provisioned.vm.clone());
        Ok(provisioned)
    }

    /// Boots a VM in place of a clone that has failed.
    pub(super) async fn boot_instead(
        &self,
        create: &CreatePlan,
        clone: Provisioned,
        error: &PodError,
    ) -> Result<Provisioned, PodError> {
        let mut slot = self.shared.vm.lock().await;
        clone.vm.kill().await;
        drop(clone);
        let plan = self.plan_vm(create, create.config.template.mode).await?;
        if let StartFrom::Template(found) = plan.from {
            self.discard_template(create, found.1, chain(error)).await;
        }
        let provisioned = self.boot(create).await?;
        *slot = Some(provisioned.vm.clone());
        Ok(provisioned)
    }

    async fn boot(&self, create: &CreatePlan) -> Result<Provisioned, PodError> {
        let VmPlan { spec, reservation, .. } = self.plan_vm(create, config::TemplateMode::Off).await?;
        let vm = Vm::launch(spec, &self.shared.dir).await.map_err(PodError::Boot)?;
        Ok(Provisioned { vm, origin: VmOrigin::Boot, _reservation: Some(reservation) })
    }

    /// Requests the template that was missing when this pod's VM was booted.
    ///
    /// The process that builds it outlives the pod, and so belongs to the cgroups `home`.
    pub(super) fn request_template(&self, home: &[PathBuf]) {
        let Some(spec) = self.afterwards().build.take() else { return };
        let config::TemplateConfig { dir, budget_mib, .. } = &self.shared.config.template;
        if let Err(error) = TemplateStore::at(dir).request(&spec, *budget_mib, home) {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Gives the pod a clone that was made ahead of time. The pod's first container uses the clone if it
    /// fits.
    pub fn adopt(&self, warm_vm: WarmVm) {
        *self.shared.warm_vm.lock().expect("no panic while held") = Some(warm_vm);
    }

    /// Sets the socket of the containerd that the pod's containers belong to. Members of the warm pool end
    /// when that containerd has ended.
    pub fn set_containerd(&self, containerd: PathBuf) {
        // It is set once in the life of a pod.
        let _ = self.shared.containerd.set(containerd);
    }

    /// Returns the VM that was made ahead of time, if it is of the planned kind and accepts its new identity.
    async fn matching_warm_vm(&self, plan: &VmPlan) -> Option<Vm> {
        let WarmVm { vm, shape } = self.take_warm_vm()?;
        let fits = matches!(&plan.from, StartFrom::Template(found) if found.1 == shape);
        let reason = match fits {
            true => match vm.configure_guest(&plan.spec.hostname).await {
                Ok(()) => return Some(vm),
                Err(error) => chain(&error),
            },
            false => "the container needs a different VM".to_owned(),
        };
        tracing::info!(pod = self.shared.name, "the warm VM cannot be used: {reason}");
        vm.kill().await;
        None
    }

    pub(super) fn take_warm_vm(&self) -> Option<WarmVm> {
        self.shared.warm_vm.lock().expect("no panic while held").take()
    }

    /// Requests further clones like this pod's VM from the warm pool, if the VM was a clone and the pool is
    /// enabled.
    ///
    /// The members outlive the pod, and so belong to the cgroups `home`.
    pub(super) fn refill_pool(&self, home: &[PathBuf]) {
        let Some(spec) = self.afterwards().refill.take() else { return };
        let containerd = self.shared.containerd.get().cloned();
        let request = pool::MemberRequest { spec, containerd, cgroups: home.to_vec() };
        let pool = Pool::of(&self.shared.config);
        if let Err(error) = pool.and_then(|pool| pool.map_or(Ok(()), |pool| pool.refill(&request))) {
            tracing::warn!("{}", chain(&error));
        }
    }

    fn afterwards(&self) -> std::sync::MutexGuard<'_, Afterwards> {
        self.shared.afterwards.lock().expect("no panic while held")
    }

    /// Marks the template as failed, so that later starts boot at once instead of failing in the same way.
    async fn discard_template(&self, create: &CreatePlan, shape: TemplateShape, reason: String) {
        tracing::warn!(pod = self.shared.name, "cannot clone a VM, booting instead: {reason}");
        let templates = TemplateStore::at(&create.config.template.dir);
        let discarded = spawn_blocking(move || templates.discard(&shape, &reason)).await;
        if let Ok(Err(error)) = discarded {
            tracing::warn!("{}", chain(&error));
        }
    }

    async fn plan_vm(&self, create: &CreatePlan, mode: config::TemplateMode) -> Result<VmPlan, PodError> {
        let requested = create.config.vm.clone();
        let (name, create) = (self.shared.name.clone(), create.clone());
        let plan =
            spawn_blocking(move || plan_vm(&name, &create, mode)).await.map_err(PodError::Worker)??;
        *self.described_vm() = Some(DescribedVm { spec: plan.spec.clone(), requested });
        Ok(plan)
    }
}

/// Checks whether the host has memory for one more VM, of the smallest size. Nothing is reserved.
///
/// # Errors
/// The host has too little memory.
pub fn admits_one_more(config: &config::Config) -> Result<(), AdmissionError> {
    let (needed, reserve) = (admission::CLONE_NEEDS_MIB, config.vm.memory_reserve_percent);
    admission::admit(&reservations_dir(), needed, reserve, HostMemory::now()?).map(drop)
}

/// Describes the VM of a container that has no annotations and no limits.
///
/// # Errors
/// The configured accelerator does not work here, or the host's memory cannot be read.
pub fn default_vm_spec(config: &config::Config, assets: &Assets) -> Result<VmSpec, PodError> {
    Ok(vm_spec::build("template", config, assets, &Spec::default(), HostMemory::now()?)?)
}

fn plan_vm(name: &str, create: &CreatePlan, mode: config::TemplateMode) -> Result<VmPlan, PodError> {
    let host = HostMemory::now()?;
    let config = &create.config;
    let spec = vm_spec::build(name, config, &create.assets, &create.guest.spec, host)?;
    let from = match mode {
        config::TemplateMode::Off => StartFrom::Boot { request_template: false },
        config::TemplateMode::Use | config::TemplateMode::Auto => find_start(name, &spec, config, mode),
    };
    let needed = match &from {
        StartFrom::Template(..) => admission::CLONE_NEEDS_MIB,
        StartFrom::Boot { .. } => BOOT_NEEDS + BOOT_NEEDS_PER_GIB * u64::from(spec.memory_mib).div_ceil(1024),
    };
    let reservation = admission::admit(&reservations_dir(), needed, config.vm.memory_reserve_percent, host)?;
    Ok(VmPlan { spec, from, reservation })
}

fn find_start(name: &str, spec: &VmSpec, config: &config::Config, mode: config::TemplateMode) -> StartFrom {
    let auto = mode == config::TemplateMode::Auto;
    // A template that is missing or not trusted does not prevent a boot, which reports its own errors.
    let found = match TemplateShape::of(spec) {
        Ok(Some(shape)) => {
            TemplateStore::at(&config.template.dir).find(&shape).map(|found| Some((found, shape)))
        }
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    match found {
        Ok(Some((FoundTemplate::Ready(template), shape))) => {
            StartFrom::Template(Box::new((*template, shape)))
        }
        Ok(Some((FoundTemplate::Absent, _))) => StartFrom::Boot { request_template: auto },
        Ok(Some((FoundTemplate::Failed(reason), _))) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {reason}");
            StartFrom::Boot { request_template: false }
        }
        Ok(Some((FoundTemplate::Building, _)) | None) => StartFrom::Boot { request_template: false },
        Err(error) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {}", chain(&error));
            StartFrom::Boot { request_template: false }
        }
    }
}
