//! What a container that is being created holds, and how a failed step gives it back.
//!
//! ```text
//!   phase      holds in addition                                undo
//!   Planned    streams of the caller                            closed
//!   Launched   VM, disks on the host, anchor                    VM released, new disk removed, anchor ended
//!   Attached   disks and volumes in the VM                      detached, if the VM stays for other containers
//!   Created    container in the guest, its hooks have run       killed and deleted there, if the VM stays
//! ```

use machinen_base::error::chain;
use machinen_protocol::process::{ProcessRef, SignalTarget};
use machinen_vm::agent::{self, AgentError};
use tokio::time::{Duration, timeout};

use super::{
    CreatePlan, CreateRequest,
    disks::{Attachments, PendingDisks},
};
use crate::{
    pod::{Pod, PodError, anchor::Anchor, phases::PhaseTimes, sandbox::AcquiredVm},
    shares::ContainerShares,
};

/// How long the guest may take to end an init that has not started the user's command.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// What all phases share, and none changes.
#[derive(Debug)]
pub(super) struct CreateJob<'a> {
    pub(super) pod: &'a Pod,
    pub(super) request: CreateRequest,
    pub(super) plan: CreatePlan,
    pub(super) phases: &'a PhaseTimes,
}

/// What a container that is being created holds from its launch on.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) vm: AcquiredVm,
    pub(super) disks: PendingDisks,
    pub(super) anchor: Anchor,
    pub(super) attachments: Attachments,
    /// The volumes that are visible in the guest.
    pub(super) shares: ContainerShares,
}

impl CreateJob<'_> {
    /// Gives everything back that was held. `created`: the agent, if the container exists in the guest.
    pub(super) async fn undo(&self, held: Held, created: Option<&agent::Client>) {
        let id = self.request.id.as_str();
        let Held { vm, disks, mut anchor, attachments, shares } = held;
        drop(vm);
        if let Err(error) = anchor.end().await {
            tracing::warn!(
                id,
                "cannot end the anchor of a container that was not created: {}",
                chain(&error)
            );
        }
        let clear = async {
            if let Some(agent) = created {
                remove_from_guest(agent, id).await?;
            }
            attachments.detach().await;
            shares.remove().await;
            Ok(())
        };
        self.release_vm(clear).await;
        // No VM uses the disks any more.
        drop(disks);
    }

    /// Ends the VM, unless other containers use it; then `clear` removes what it has of this container.
    pub(super) async fn release_vm(&self, clear: impl Future<Output = Result<(), PodError>>) {
        // The user's command has not run, so the container has written nothing.
        self.pod.shared.sandbox.release(&self.request.id, true, clear).await;
        self.pod.shared.shares.settle().await;
    }
}

/// Removes a container whose init waits.
async fn remove_from_guest(agent: &agent::Client, id: &str) -> Result<(), PodError> {
    let end = async {
        agent.signal_process(id, &SignalTarget::All, libc::SIGKILL.cast_unsigned()).await?;
        agent.wait_process(id, &ProcessRef::Init).await?;
        agent.delete_container(id).await
    };
    let ended = timeout(END_PATIENCE, end).await;
    let ended =
        ended.unwrap_or(Err(AgentError::Deadline { call: "delete_container", deadline: END_PATIENCE }));
    ended.map_err(|source| PodError::guest("remove", id, source))
}
