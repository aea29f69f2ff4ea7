//! The second phase of a container's creation: launched. Its step attaches the disks to the VM.

use machinen_protocol::api::InjectedFile;
use machinen_vm::{DiskAddress, agent};

use super::{
    disks::{Attachments, ContainerDisks},
    finish::Attached,
    undo::{CreateJob, Held},
};
use crate::pod::{PodError, stdio::HostStdio};

/// The VM starts, the disks are open, and the anchor's process exists.
#[derive(Debug)]
pub(super) struct Launched<'a> {
    pub(super) job: CreateJob<'a>,
    pub(super) stdio: HostStdio,
    pub(super) injected: Vec<InjectedFile>,
    pub(super) held: Held,
}

impl<'a> Launched<'a> {
    /// Attaches the disks while the guest starts, and waits for its agent. A clone that fails is replaced by a
    /// VM that boots.
    ///
    /// # Errors
    /// The VM does not start, or refuses a disk. Nothing is left then.
    pub(super) async fn attach(self) -> Result<Attached<'a>, PodError> {
        let Self { job, stdio, injected, mut held } = self;
        let mut attached = job.attach_disks(&held).await;
        if let Err(error) = &attached
            && held.vm.origin.is_clone()
        {
            attached = job.attach_to_booted(&mut held, error).await;
        }
        match attached {
            Ok((addresses, agent)) => Ok(Attached { job, stdio, injected, held, addresses, agent }),
            Err(error) => {
                job.undo(held, None).await;
                Err(error)
            }
        }
    }
}

impl CreateJob<'_> {
    async fn attach_disks(
        &self,
        held: &Held,
    ) -> Result<(ContainerDisks<DiskAddress>, agent::Client), PodError> {
        held.attachments.attach(&self.request.id, &held.disks.open, self.phases).await
    }

    async fn attach_to_booted(
        &self,
        held: &mut Held,
        error: &PodError,
    ) -> Result<(ContainerDisks<DiskAddress>, agent::Client), PodError> {
        let (sandbox, request) = (&self.pod.shared.sandbox, self.plan.vm_request());
        sandbox.boot_instead(&self.request.id, &request, &mut held.vm, error).await?;
        held.attachments = Attachments::new(held.vm.vm.clone());
        self.attach_disks(held).await
    }
}
