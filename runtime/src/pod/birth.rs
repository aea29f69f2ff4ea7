//! How a pod gets its VM: as a clone of a template where there is one, else by booting.
//!
//! A clone that cannot be had is no error: the VM boots instead, and the log says so in one line. The first start of
//! its kind also asks for a template, once its container runs, so that nobody waits for it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use oci_spec::runtime::Spec;
use tokio::task::spawn_blocking;

use super::{Pod, PodError, create::Prepared, vm_spec};
use crate::{
    RUN_DIR,
    admission::{self, AdmissionError, HostMemory, Promise},
    assets::Assets,
    config,
    error::chain,
    pool::{self, Pool, Ready},
    template::{Found, Shape, Template, TemplateStore},
    vm::{Vm, VmSpec},
};

/// What a VM takes of the host's memory until its container runs, MiB: a clone its own pages, a boot all that it
/// touches, and the descriptions of its pages.
pub(crate) const CLONE_NEEDS: u64 = 64;
const BOOT_NEEDS: u64 = 160;
const BOOT_NEEDS_PER_GIB: u64 = 16;

/// A clone answers in a tenth of a second; one that has not by now is not going to, and a boot takes its place.
const CLONE_TIMEOUT: Duration = Duration::from_secs(20);

/// The VM for a container that is being created.
#[derive(Debug)]
pub(super) struct Birth {
    pub(super) vm: Vm,
    pub(super) origin: Origin,
    /// Until the container is created.
    _promise: Option<Promise>,
}

/// Where the VM of a container comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Clone,
    /// A clone that was made ahead of time.
    Ready,
    Boot,
    /// It was there for the pod's earlier containers.
    Pod,
}

impl Origin {
    /// In its place another VM can boot.
    pub(super) fn is_clone(self) -> bool {
        matches!(self, Self::Clone | Self::Ready)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clone => "clone",
            Self::Ready => "ready",
            Self::Boot => "boot",
            Self::Pod => "pod",
        })
    }
}

/// How to start a VM that is described.
#[derive(Debug)]
struct Plan {
    spec: VmSpec,
    from: From,
    promise: Promise,
}

#[derive(Debug)]
enum From {
    Template(Box<(Template, Shape)>),
    Boot { ask_for_template: bool },
}

impl Pod {
    /// The pod's VM, on its way to life if this is its first container.
    pub(super) async fn vm(&self, prepared: &Prepared) -> Result<Birth, PodError> {
        let mut slot = self.shared.vm.lock().await;
        if let Some(vm) = &*slot {
            return Ok(Birth { vm: vm.clone(), origin: Origin::Pod, _promise: None });
        }
        let plan = self.plan(prepared, prepared.config.template.mode).await?;
        if let From::Template(_) = &plan.from
            && self.shared.config.pool.size > 0
        {
            *self.repeated() = Some(plan.spec.clone());
        }
        if let Some(vm) = self.ready_for(&plan).await {
            *slot = Some(vm.clone());
            return Ok(Birth { vm, origin: Origin::Ready, _promise: Some(plan.promise) });
        }
        let birth = match plan {
            Plan { mut spec, from: From::Template(found), promise } => {
                let (template, shape) = *found;
                spec.boot_timeout = spec.boot_timeout.min(CLONE_TIMEOUT);
                match Vm::restore(spec, &self.shared.dir, &template.snapshot).await {
                    Ok(vm) => Birth { vm, origin: Origin::Clone, _promise: Some(promise) },
                    Err(error) => {
                        self.give_up_on(prepared, shape, chain(&error)).await;
                        self.boot(prepared).await?
                    }
                }
            }
            Plan { spec, from: From::Boot { ask_for_template }, promise } => {
                if ask_for_template {
                    *self.wanted_template() = Some(spec.clone());
                }
                let vm = Vm::launch(spec, &self.shared.dir).await.map_err(PodError::Boot)?;
                Birth { vm, origin: Origin::Boot, _promise: Some(promise) }
            }
        };
        *slot = Some(birth.vm.clone());
        Ok(birth)
    }

    /// Puts a VM that boots in the place of a clone that is of no use.
    pub(super) async fn boot_instead(
        &self,
        prepared: &Prepared,
        clone: Birth,
        error: &PodError,
    ) -> Result<Birth, PodError> {
        let mut slot = self.shared.vm.lock().await;
        clone.vm.kill().await;
        drop(clone);
        let plan = self.plan(prepared, prepared.config.template.mode).await?;
        if let From::Template(found) = plan.from {
            self.give_up_on(prepared, found.1, chain(error)).await;
        }
        let birth = self.boot(prepared).await?;
        *slot = Some(birth.vm.clone());
        Ok(birth)
    }

    async fn boot(&self, prepared: &Prepared) -> Result<Birth, PodError> {
        let Plan { spec, promise, .. } = self.plan(prepared, config::TemplateMode::Off).await?;
        let vm = Vm::launch(spec, &self.shared.dir).await.map_err(PodError::Boot)?;
        Ok(Birth { vm, origin: Origin::Boot, _promise: Some(promise) })
    }

    /// Has the template built that this pod's VM could have been a clone of, if there was none.
    pub(super) fn ask_for_template(&self) {
        let Some(spec) = self.wanted_template().take() else { return };
        let config::Template { dir, budget_mib, .. } = &self.shared.config.template;
        if let Err(error) = TemplateStore::at(dir).request(&spec, *budget_mib) {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Gives the pod a clone that was made ahead of time, for its first container to use if it fits.
    pub fn adopt(&self, ready: Ready) {
        *self.shared.ready.lock().expect("no panic while held") = Some(ready);
    }

    /// Names the socket of the containerd that the pod's containers are for. Members of the warm pool end when it has gone.
    pub fn serves(&self, containerd: PathBuf) {
        // There is one for the life of a pod.
        let _ = self.shared.containerd.set(containerd);
    }

    /// The VM that was made ahead of time, if it is what is planned and takes its new identity.
    async fn ready_for(&self, plan: &Plan) -> Option<Vm> {
        let Ready { vm, shape } = self.take_ready()?;
        let fits = matches!(&plan.from, From::Template(found) if found.1 == shape);
        let reason = match fits {
            true => match vm.configure_guest(&plan.spec.hostname).await {
                Ok(()) => return Some(vm),
                Err(error) => chain(&error),
            },
            false => "the container wants another VM".to_owned(),
        };
        tracing::info!(pod = self.shared.name, "the ready clone is of no use: {reason}");
        vm.kill().await;
        None
    }

    pub(super) fn take_ready(&self) -> Option<Ready> {
        self.shared.ready.lock().expect("no panic while held").take()
    }

    /// Has the warm pool filled again with VMs like this pod's, if that was a clone and there is to be a pool.
    pub(super) fn refill_pool(&self) {
        let Some(spec) = self.repeated().take() else { return };
        let request = pool::Request { spec, containerd: self.shared.containerd.get().cloned() };
        let pool = Pool::of(&self.shared.config);
        if let Err(error) = pool.and_then(|pool| pool.map_or(Ok(()), |pool| pool.refill(&request))) {
            tracing::warn!("{}", chain(&error));
        }
    }

    fn repeated(&self) -> std::sync::MutexGuard<'_, Option<VmSpec>> {
        self.shared.repeated.lock().expect("no panic while held")
    }

    fn wanted_template(&self) -> std::sync::MutexGuard<'_, Option<VmSpec>> {
        self.shared.wanted_template.lock().expect("no panic while held")
    }

    /// Later starts boot too, instead of failing at the same template.
    async fn give_up_on(&self, prepared: &Prepared, shape: Shape, reason: String) {
        tracing::warn!(pod = self.shared.name, "cannot clone a VM, booting instead: {reason}");
        let templates = TemplateStore::at(&prepared.config.template.dir);
        let discarded = spawn_blocking(move || templates.discard(&shape, &reason)).await;
        if let Ok(Err(error)) = discarded {
            tracing::warn!("{}", chain(&error));
        }
    }

    async fn plan(&self, prepared: &Prepared, mode: config::TemplateMode) -> Result<Plan, PodError> {
        let (name, prepared) = (self.shared.name.clone(), prepared.clone());
        let plan = spawn_blocking(move || plan(&name, &prepared, mode)).await.map_err(PodError::Worker)??;
        self.shared.vm_memory_mib.store(plan.spec.memory_mib, Ordering::Relaxed);
        self.shared.vm_vcpus.store(plan.spec.vcpus, Ordering::Relaxed);
        Ok(plan)
    }
}

/// Whether a VM more would be refused now, even if it took as little as one can. Nothing is promised.
///
/// # Errors
/// It would be.
pub fn admits_one_more(config: &config::Config) -> Result<(), AdmissionError> {
    let dir = Path::new(RUN_DIR).join("starting");
    admission::admit(&dir, CLONE_NEEDS, config.vm.memory_reserve_percent, HostMemory::now()?).map(drop)
}

/// The VM of a container that has no annotations and no limits.
///
/// # Errors
/// The configured accelerator does not work here, or the host's memory cannot be read.
pub fn plain_vm(config: &config::Config, assets: &Assets) -> Result<VmSpec, PodError> {
    Ok(vm_spec::build("template", config, assets, &Spec::default(), HostMemory::now()?)?)
}

fn plan(name: &str, prepared: &Prepared, mode: config::TemplateMode) -> Result<Plan, PodError> {
    let host = HostMemory::now()?;
    let config = &prepared.config;
    let spec = vm_spec::build(name, config, &prepared.assets, &prepared.guest.spec, host)?;
    let from = match mode {
        config::TemplateMode::Off => From::Boot { ask_for_template: false },
        config::TemplateMode::Use | config::TemplateMode::Auto => from_template(name, &spec, config, mode),
    };
    let needed = match &from {
        From::Template(..) => CLONE_NEEDS,
        From::Boot { .. } => BOOT_NEEDS + BOOT_NEEDS_PER_GIB * u64::from(spec.memory_mib).div_ceil(1024),
    };
    let dir = Path::new(RUN_DIR).join("starting");
    let promise = admission::admit(&dir, needed, config.vm.memory_reserve_percent, host)?;
    Ok(Plan { spec, from, promise })
}

fn from_template(name: &str, spec: &VmSpec, config: &config::Config, mode: config::TemplateMode) -> From {
    let auto = mode == config::TemplateMode::Auto;
    // What is missing or not to be trusted is no reason not to boot, which says more of it.
    let found = match Shape::of(spec) {
        Ok(Some(shape)) => {
            TemplateStore::at(&config.template.dir).find(&shape).map(|found| Some((found, shape)))
        }
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    match found {
        Ok(Some((Found::Ready(template), shape))) => From::Template(Box::new((*template, shape))),
        Ok(Some((Found::Absent, _))) => From::Boot { ask_for_template: auto },
        Ok(Some((Found::Failed(reason), _))) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {reason}");
            From::Boot { ask_for_template: false }
        }
        Ok(Some((Found::Building, _)) | None) => From::Boot { ask_for_template: false },
        Err(error) => {
            tracing::warn!(pod = name, "booting a VM, because there is no template of it: {}", chain(&error));
            From::Boot { ask_for_template: false }
        }
    }
}
