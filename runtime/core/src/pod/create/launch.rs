//! The first phase of a container's creation: planned. Its step starts the VM and opens the disks.
//!
//! The VM, the base disk, the writable disk and the standard streams do not depend on each other, so all of
//! them start at once.

use std::pin::pin;

use machinen_protocol::api::InjectedFile;
use machinen_vm::{Vm, VmError};
use tokio::sync::{oneshot, watch};

use super::{
    CreateRequest,
    attach::Launched,
    disks::{self, Attachments},
    plan::CheckpointOrigin,
    undo::{CreateJob, Held},
};
use crate::{
    pod::{Pod, PodError, anchor::Anchor, phases::PhaseTimes, stdio::HostStdio},
    shares::ContainerShares,
};

/// The caller's files were read and its streams opened. Nothing is changed on the host.
#[derive(Debug)]
pub(super) struct Planned<'a> {
    job: CreateJob<'a>,
    stdio: HostStdio,
    injected: Vec<InjectedFile>,
}

impl<'a> Planned<'a> {
    /// Makes all checks that change nothing on the host or in the guest.
    ///
    /// # Errors
    /// The bundle, the root file system, a stream or a file of the host cannot be used.
    pub(super) async fn new(
        pod: &'a Pod,
        request: CreateRequest,
        phases: &'a PhaseTimes,
    ) -> Result<Self, PodError> {
        let plan = pod.plan(&request, CheckpointOrigin::Client).await?;
        let stdio = HostStdio::open(&request.stdio, &pod.owner(&request.id))?;
        let injected = plan.read_injected().await?;
        Ok(Self { job: CreateJob { pod, request, plan, phases }, stdio, injected })
    }

    /// Starts the VM, or joins the one that runs, and opens the disks.
    ///
    /// # Errors
    /// There is no VM or disk, or a logging program is not ready. Nothing is left then.
    pub(super) async fn launch(mut self) -> Result<Launched<'a>, PodError> {
        match self.start().await {
            Ok(held) => {
                let Self { job, stdio, injected } = self;
                Ok(Launched { job, stdio, injected, held })
            }
            Err(error) => {
                self.job.release_vm(async { Ok(()) }).await;
                Err(error)
            }
        }
    }

    async fn start(&mut self) -> Result<Held, PodError> {
        let CreateJob { pod, request, plan, phases } = &self.job;
        let vm_request = plan.vm_request();
        let (launched, mut launched_vm) = watch::channel(None);
        let (opened, first_disks) = oneshot::channel();
        let vm = async {
            // No disks are a reason to start without them: the cause is reported where they are opened.
            let first_disks = async { first_disks.await.ok().flatten() };
            let acquired = pod.shared.sandbox.acquire(&request.id, &vm_request, first_disks);
            let acquired = phases.time("vm-launch", acquired).await?;
            // A clone that ends early is not an error: another VM is booted instead once the disks are there.
            launched.send_replace(Some(acquired.vm.clone()).filter(|_| !acquired.origin.is_clone()));
            Ok(acquired)
        };
        // Converting an image can take long, so the end of the VM is reported without waiting for it.
        let disks = async {
            let disks = tokio::select! {
                disks = disks::open(plan, &request.id, phases) => disks?,
                error = vm_end(&mut launched_vm) => return Err(error),
            };
            // There is no receiver if the VM does not wait for disks.
            let _ = opened.send(disks.for_slots(&request.id, plan)?);
            Ok(disks)
        };
        let stdio = async { self.stdio.ready().await.map_err(PodError::from) };
        let others = async { tokio::try_join!(disks, stdio) };
        let (vm, (disks, ())) = with_vm(vm, others).await?;
        if let Some(restore) = &plan.restore {
            restore.check_kernel(vm.vm.spec())?;
            restore.check_rootfs(disks.base.filter(|_| plan.rootfs.is_overlaid()))?;
        }
        // From here on the guest proceeds on its own, so work on the host does not delay the start.
        pod.shared.shares.prepare(&plan.volumes).await?;
        let namespaces = plan.namespaces.of_anchor()?;
        let anchor = Anchor::spawn(&request.id, plan.netns(), namespaces).await?;
        let attachments = Attachments::new(vm.vm.clone(), plan.config.rootdisk.reserve(), vm.has_disks);
        Ok(Held { vm, disks, anchor, attachments, shares: ContainerShares::default() })
    }
}

/// Waits for a VM and for what is made at the same time. If that fails, the VM is waited for nevertheless: only
/// a VM that has started can be ended with everything that belongs to it.
///
/// # Errors
/// The first error. A VM that has started is to be released by the caller.
pub(in crate::pod) async fn with_vm<V, O>(
    vm: impl Future<Output = Result<V, PodError>>,
    others: impl Future<Output = Result<O, PodError>>,
) -> Result<(V, O), PodError> {
    let (mut vm, mut others) = (pin!(vm), pin!(others));
    tokio::select! {
        biased;
        started = &mut vm => {
            let started = started?;
            Ok((started, others.await?))
        }
        made = &mut others => match made {
            Ok(made) => Ok((vm.await?, made)),
            Err(error) => {
                drop(vm.await);
                Err(error)
            }
        }
    }
}

/// Resolves when the VM has ended. Stays pending while there is no VM.
async fn vm_end(launched: &mut watch::Receiver<Option<Vm>>) -> PodError {
    let vm = launched.wait_for(Option::is_some).await.ok().and_then(|vm| vm.clone());
    match vm {
        Some(vm) => PodError::Boot(VmError::Exited(vm.exited().await)),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{sync::oneshot, task::yield_now};

    use super::*;

    fn error() -> PodError {
        PodError::Exists { id: "c1".to_owned() }
    }

    #[tokio::test]
    async fn a_vm_that_is_starting_is_never_abandoned() {
        let (started, mut is_started) = oneshot::channel();
        let vm = async {
            yield_now().await;
            started.send(()).unwrap();
            Ok(())
        };
        assert!(with_vm(vm, async { Err::<(), _>(error()) }).await.is_err());
        assert!(is_started.try_recv().is_ok());
    }

    #[tokio::test]
    async fn a_vm_that_fails_is_not_kept_waiting_by_an_image_that_is_converted() {
        let others = std::future::pending::<Result<(), PodError>>();
        assert!(with_vm(async { Err::<(), _>(error()) }, others).await.is_err());
    }

    #[tokio::test]
    async fn both_are_returned_whichever_comes_first() {
        let late = |value| async move {
            yield_now().await;
            Ok(value)
        };
        assert_eq!(with_vm(late(1), async { Ok(2) }).await.unwrap(), (1, 2));
        assert_eq!(with_vm(async { Ok(1) }, late(2)).await.unwrap(), (1, 2));
    }
}
