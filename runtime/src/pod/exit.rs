//! What follows when a container's init ends, by itself or with its VM.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use machinen_protocol::api::WaitProcessResponse;
use tokio::time::Duration;

use super::{Container, Entry, Event, Exit, Pod, Transition, stdio::Logger, streams::Outputs};
use crate::{
    agent::{self, AgentError},
    error::chain,
    vm::Vm,
};

/// Longest wait for a VM to sync its disks and power off before it is killed.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// What containerd's clients expect of a container whose VM was lost: as if killed by SIGKILL.
const LOST: u32 = 128 + libc::SIGKILL as u32;

/// Statuses above are of no process; a guest that claims one is not believed.
const MAX_STATUS: u32 = 255;

impl Pod {
    /// Waits for the end of `container`, delivers its output, and takes down what it leaves behind.
    pub(super) async fn watch(
        self,
        container: Arc<Container>,
        agent: agent::Client,
        vm: Vm,
        outputs: Outputs,
    ) {
        let told = AtomicU64::new(0);
        let mut waiting = pin!(agent.wait_process(&container.id, ""));
        let beside = async {
            tokio::join!(self.watch_memory(&container, &agent, &told), self.follow_anchor(&container))
        };
        let waited = tokio::select! {
            biased;
            waited = &mut waiting => waited,
            ((), ()) = beside => waiting.await,
        };
        let untold_kill = waited.as_ref().is_ok_and(|ended| ended.oom_kills > told.into_inner());
        if let Err(error) = &waited {
            // Without its agent a VM is of no use; one that was lost already makes this a no-op.
            vm.kill().await;
            let reason = vm.exited().await;
            tracing::error!(id = container.id, "container lost: {}: {reason}", chain(error));
        }
        // Whether the guest is there to export what the container has written, and whether that is nothing.
        let unchanged = waited.as_ref().ok().map(|ended| ended.layer_unchanged);
        let (exit, logger) = ended(&container.id, outputs, waited).await;
        // What else ran in the container has ended with its init, and says so first.
        container.execs.end().await;
        container.end_anchor().await;
        // Before anyone is told of the end: who hears of it may read the snapshot.
        let saved = match unchanged {
            Some(unchanged) => container.layer.export_at_end(&vm, &agent, &container.id, unchanged).await,
            None => None,
        };
        self.record(&container, exit, untold_kill).await;
        let secure = container.layer.secure(saved).await;
        self.clean(&container, &agent, secure).await;
        if secure {
            container.layer.discard_disk().await;
        }
        if let Some(logger) = logger {
            logger.finish().await;
        }
        container.init.set_gone();
    }

    /// Who kills the process that stands for a container means the container.
    async fn follow_anchor(&self, container: &Container) {
        let exit = container.anchor_ended().await;
        tracing::info!(id = container.id, "the container's anchor has ended ({exit}): killing the container");
        if let Err(error) = self.kill(&container.id, "", libc::SIGKILL.cast_unsigned(), false).await {
            tracing::warn!(id = container.id, "cannot kill the container of an anchor: {}", chain(&error));
        }
    }

    /// A kill for want of memory is told before the end that it brought.
    async fn record(&self, container: &Container, exit: Exit, untold_kill: bool) {
        let _ordered = container.init.transitions.lock().await;
        if let Err(error) = container.init.advance(Transition::Exited(exit)) {
            tracing::error!(id = container.id, "exit reported twice: {error}");
            return;
        }
        if untold_kill {
            self.emit(Event::OutOfMemory { id: container.id.clone() });
        }
        tracing::info!(id = container.id, status = exit.status, "container exited");
        let (id, exec_id) = (container.id.clone(), String::new());
        self.emit(Event::Exited { id, exec_id, pid: container.pid, exit });
    }

    /// The VM goes with its last running container; otherwise only the container's part of the guest does.
    ///
    /// With its writes on the host (`secure`), a VM has nothing to sync: the disks of containers that ended before it
    /// were synced when they were deleted.
    async fn clean(&self, container: &Container, agent: &agent::Client, secure: bool) {
        let mut slot = self.shared.vm.lock().await;
        if self.has_others(&container.id) {
            if let Err(error) = agent.delete_container(&container.id).await {
                tracing::warn!(id = container.id, "cannot clean up in the guest: {}", chain(&error));
                self.shared.unsynced.store(true, Ordering::Relaxed);
            }
        } else if let Some(vm) = slot.take() {
            let synced = secure && !self.shared.unsynced.load(Ordering::Relaxed);
            let exit = if synced { vm.kill().await } else { vm.shutdown(SHUTDOWN_GRACE).await };
            tracing::debug!(id = container.id, "VM ended: {exit}");
        }
    }

    fn has_others(&self, id: &str) -> bool {
        self.containers().iter().any(|(other, entry)| {
            other != id
                && match entry {
                    Entry::Creating => true,
                    Entry::Ready(container) => !container.init.is_gone(),
                }
        })
    }
}

/// Delivers what a process has written, and says how it ended. A logging program is left to be waited for.
pub(super) async fn ended(
    id: &str,
    outputs: Outputs,
    waited: Result<WaitProcessResponse, AgentError>,
) -> (Exit, Option<Logger>) {
    match waited {
        Ok(ended) => {
            // The guest's clock and its claims are the tenant's: time is taken here, and the status is bounded.
            let status = ended.exit_status.min(MAX_STATUS);
            let exit = Exit { status, at: SystemTime::now(), oom_killed: ended.oom_kills > 0 };
            (exit, outputs.deliver(id, &ended).await)
        }
        Err(error) => {
            tracing::debug!(id, "not waited for: {}", chain(&error));
            let logger = outputs.abandon().await;
            (Exit { status: LOST, at: SystemTime::now(), oom_killed: false }, logger)
        }
    }
}
