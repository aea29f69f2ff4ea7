//! What follows when a container's init ends, by itself or with its VM.

use std::{sync::Arc, time::SystemTime};

use machinen_protocol::api::WaitProcessResponse;
use tokio::time::Duration;

use super::{Container, Entry, Event, Exit, Pod, Transition, stdio::Output};
use crate::{agent, error::chain, vm::Vm};

/// Longest wait for a VM to sync its disks and power off before it is killed.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// What containerd's clients expect of a container whose VM was lost: as if killed by SIGKILL.
const LOST: u32 = 128 + libc::SIGKILL as u32;

/// Statuses above are of no process; a guest that claims one is not believed.
const MAX_STATUS: u32 = 255;

/// The two output streams of a container's init.
#[derive(Debug)]
pub(super) struct Outputs {
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
}

impl Pod {
    /// Waits for the end of `container`, delivers its output, and takes down what it leaves behind.
    pub(super) async fn watch(
        self,
        container: Arc<Container>,
        agent: agent::Client,
        vm: Vm,
        outputs: Outputs,
    ) {
        let exit = match agent.wait_process(&container.id, "").await {
            Ok(ended) => deliver(&container.id, outputs, &ended).await,
            Err(error) => {
                // Without its agent a VM is of no use; one that was lost already makes this a no-op.
                vm.kill().await;
                let reason = vm.exited().await;
                tracing::error!(id = container.id, "container lost: {}: {reason}", chain(&error));
                outputs.abandon().await;
                Exit { status: LOST, at: SystemTime::now(), oom_killed: false }
            }
        };
        container.end_anchor().await;
        self.record(&container, exit).await;
        self.clean(&container, &agent).await;
        container.cleaned.send_replace(true);
    }

    async fn record(&self, container: &Container, exit: Exit) {
        let _ordered = container.transitions.lock().await;
        if let Err(error) = container.advance(Transition::Exited(exit)) {
            tracing::error!(id = container.id, "exit reported twice: {error}");
            return;
        }
        if exit.oom_killed {
            self.emit(Event::OutOfMemory { id: container.id.clone() });
        }
        tracing::info!(id = container.id, status = exit.status, "container exited");
        self.emit(Event::Exited { id: container.id.clone(), pid: container.pid, exit });
    }

    /// The VM goes with its last running container; otherwise only the container's part of the guest does.
    async fn clean(&self, container: &Container, agent: &agent::Client) {
        let mut slot = self.shared.vm.lock().await;
        if self.has_others(&container.id) {
            if let Err(error) = agent.delete_container(&container.id).await {
                tracing::warn!(id = container.id, "cannot clean up in the guest: {}", chain(&error));
            }
        } else if let Some(vm) = slot.take() {
            let exit = vm.shutdown(SHUTDOWN_GRACE).await;
            tracing::debug!(id = container.id, "VM ended: {exit}");
        }
    }

    fn has_others(&self, id: &str) -> bool {
        self.containers().iter().any(|(other, entry)| {
            other != id
                && match entry {
                    Entry::Creating => true,
                    Entry::Ready(container) => !*container.cleaned.borrow(),
                }
        })
    }
}

async fn deliver(id: &str, outputs: Outputs, ended: &WaitProcessResponse) -> Exit {
    // The guest's clock and its claims are the tenant's: time is taken here, and the status is bounded.
    let exit = Exit {
        status: ended.exit_status.min(MAX_STATUS),
        at: SystemTime::now(),
        oom_killed: ended.oom_killed,
    };
    let finish = async |output: Option<Output>, bytes| match output {
        Some(output) => output.finish(bytes).await,
        None => Ok(()),
    };
    let (stdout, stderr) =
        tokio::join!(finish(outputs.stdout, ended.stdout_bytes), finish(outputs.stderr, ended.stderr_bytes));
    for problem in [stdout, stderr].into_iter().filter_map(Result::err) {
        tracing::error!(id, "{problem}");
    }
    exit
}

impl Outputs {
    async fn abandon(self) {
        for output in [self.stdout, self.stderr].into_iter().flatten() {
            output.abandon().await;
        }
    }
}
