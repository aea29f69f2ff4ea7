//! What happens when a container's init ends, by itself or with its VM.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use machinen_base::error::chain;
use machinen_protocol::api::WaitProcessResponse;
use machinen_vm::{
    Vm,
    agent::{self, AgentError},
};
use tokio::time::Duration;

use super::{
    Container, ContainerSlot, Pod, PodEvent, ProcessExit, Transition, state::KILLED, stdio::Logger,
    streams::Outputs,
};

/// Longest wait for a VM to sync its disks and power off before it is killed.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// No process has a status above this; a larger claim of the guest is reduced to it.
const MAX_STATUS: u32 = 255;

impl Pod {
    /// Waits for the end of `container`, delivers its output, and removes what it leaves behind.
    pub(super) async fn watch(
        self,
        container: Arc<Container>,
        agent: agent::Client,
        vm: Vm,
        outputs: Outputs,
    ) {
        let reported = AtomicU64::new(0);
        let mut waiting = pin!(agent.wait_process(&container.id, ""));
        let watchers = async {
            tokio::join!(self.watch_memory(&container, &agent, &reported), self.follow_anchor(&container))
        };
        let waited = tokio::select! {
            biased;
            waited = &mut waiting => waited,
            ((), ()) = watchers => waiting.await,
        };
        let mut unreported_kill = waited.as_ref().is_ok_and(|ended| ended.oom_kills > reported.into_inner());
        if let Err(error) = &waited {
            // A VM is useless without its agent. If the VM has ended already, this does nothing.
            vm.kill().await;
            let (reason, out_of_memory) = self.reason_of_loss(vm.exited().await).await;
            unreported_kill = out_of_memory;
            tracing::error!(id = container.id, "container lost: {}: {reason}", chain(error));
        }
        // None: the guest is lost and cannot export the container's changes. Otherwise whether there are no
        // changes.
        let unchanged = waited.as_ref().ok().map(|ended| ended.layer_unchanged);
        let (exit, logger) = finish_output(&container.id, outputs, waited).await;
        // The other processes of the container have ended with the init; their exits are reported first.
        container.execs.end().await;
        container.end_anchor().await;
        // This comes before the exit is reported, since clients may read the snapshot as soon as they receive
        // that event.
        let saved = match unchanged {
            Some(unchanged) => container.layer.export_at_end(&vm, &agent, &container.id, unchanged).await,
            None => None,
        };
        self.record(&container, exit, unreported_kill).await;
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

    /// Killing the process that stands for a container kills the container.
    async fn follow_anchor(&self, container: &Container) {
        let exit = container.anchor_ended().await;
        tracing::info!(id = container.id, "the container's anchor has ended ({exit}): killing the container");
        if let Err(error) = self.kill(&container.id, "", libc::SIGKILL.cast_unsigned(), false).await {
            tracing::warn!(id = container.id, "cannot kill the container of an anchor: {}", chain(&error));
        }
    }

    /// An out-of-memory kill is reported before the exit that it caused.
    async fn record(&self, container: &Container, exit: ProcessExit, unreported_kill: bool) {
        let _ordered = container.init.transitions.lock().await;
        if let Err(error) = container.init.advance(Transition::Exited(exit)) {
            tracing::error!(id = container.id, "exit reported twice: {error}");
            return;
        }
        if unreported_kill {
            self.emit(PodEvent::OutOfMemory { id: container.id.clone() });
        }
        tracing::info!(id = container.id, status = exit.status, "container exited");
        let (id, exec_id) = (container.id.clone(), String::new());
        self.emit(PodEvent::Exited { id, exec_id, pid: container.pid, exit });
    }

    /// Ends the VM with its last running container; otherwise removes only this container from the guest.
    ///
    /// If the changes are safe on the host (`secure`), the VM has nothing to sync: the disks of containers
    /// that ended earlier were synced when they were deleted.
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
                    ContainerSlot::Creating => true,
                    ContainerSlot::Ready(container) => !container.init.is_gone(),
                }
        })
    }
}

/// Delivers the rest of a process's output, and returns how the process ended. The caller waits for the
/// logging program.
pub(super) async fn finish_output(
    id: &str,
    outputs: Outputs,
    waited: Result<WaitProcessResponse, AgentError>,
) -> (ProcessExit, Option<Logger>) {
    match waited {
        Ok(ended) => {
            // The guest is not trusted: the time is taken on the host, and the status is bounded.
            let status = ended.exit_status.min(MAX_STATUS);
            let exit = ProcessExit { status, at: SystemTime::now() };
            (exit, outputs.deliver(id, &ended).await)
        }
        Err(error) => {
            tracing::debug!(id, "cannot wait for the process: {}", chain(&error));
            let logger = outputs.abandon().await;
            (ProcessExit { status: KILLED, at: SystemTime::now() }, logger)
        }
    }
}
