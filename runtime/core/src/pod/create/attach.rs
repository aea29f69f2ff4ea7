//! The second phase of a container's creation: launched. Its step attaches the disks to the VM, and connects its network.

use std::sync::Arc;

use machinen_protocol::api::InjectedFile;
use machinen_vm::{DiskAddress, agent};

use super::{
    disks::{Attachments, ContainerDisks, PendingDisks},
    finish::Attached,
    undo::{CreateJob, Held},
};
use crate::{
    network::{NetworkError, PodNetwork},
    pod::{PodError, stdio::HostStdio},
};

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
        let mut attached = job.attach_and_connect(&held).await;
        if let Err(error) = &attached
            && held.vm.origin.is_clone()
            && !error.is_about_the_network()
        {
            attached = job.attach_to_booted(&mut held, error).await;
        }
        match attached {
            Ok(((addresses, agent), network)) => {
                Ok(Attached { job, stdio, injected, held, addresses, agent, network })
            }
            Err(error) => {
                job.undo(held, None).await;
                Err(error)
            }
        }
    }
}

type AttachedDisks = (ContainerDisks<DiskAddress>, agent::Client);

impl CreateJob<'_> {
    /// Attaches the disks, and connects the VM with the container's network meanwhile. This process enters the pod's
    /// cgroup with a VM that boots, before the guest uses much memory.
    async fn attach_and_connect(
        &self,
        held: &Held,
    ) -> Result<(AttachedDisks, Option<Arc<PodNetwork>>), PodError> {
        let PendingDisks { open, copies, .. } = &held.disks;
        let host = &self.plan.host_disks;
        let disks = held.attachments.attach(&self.request.id, open, host, copies, self.phases);
        let network = async {
            let namespace = held.anchor.netns().map_err(NetworkError::Enter).map_err(PodError::Network)?;
            let sandbox = &self.pod.shared.sandbox;
            let (named, outside) = (self.plan.names_netns(), self.plan.outside.clone());
            let path = self.plan.packet_path;
            let network =
                sandbox.connect(&self.request.id, &held.vm.vm, namespace, named, outside, path).await?;
            if let Some((network, resolv_conf)) = network.as_ref().zip(self.plan.resolv_conf()) {
                network.add_resolv_conf(resolv_conf);
            }
            Ok::<_, PodError>(network)
        };
        let cgroup = self.enter_cgroup(!held.vm.origin.is_clone());
        let (disks, network, cgroup) = tokio::join!(disks, self.phases.time("tap", network), cgroup);
        cgroup?;
        Ok((disks?, network?))
    }

    /// Enters the pod's cgroup on the host if it is `now` that this is to be done, and it has not been done. Meanwhile no process
    /// and no thread can be made on the host, for some 10 ms.
    pub(super) async fn enter_cgroup(&self, now: bool) -> Result<(), PodError> {
        if !now {
            return Ok(());
        }
        self.phases.time("cgroup", self.pod.enter_cgroup(&self.plan)).await
    }

    async fn attach_to_booted(
        &self,
        held: &mut Held,
        error: &PodError,
    ) -> Result<(AttachedDisks, Option<Arc<PodNetwork>>), PodError> {
        let (sandbox, request) = (&self.pod.shared.sandbox, self.plan.vm_request());
        sandbox.boot_instead(&self.request.id, &request, &mut held.vm, error).await?;
        held.attachments = Attachments::new(held.vm.vm.clone(), self.plan.config.rootdisk.reserve(), false);
        self.attach_and_connect(held).await
    }
}
