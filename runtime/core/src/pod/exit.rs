//! What happens when a container's init ends, by itself or with its VM.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::SystemTime,
};

use machinen_base::error::chain;
use machinen_protocol::{api::WaitProcessResponse, process::ProcessRef};
use machinen_vm::{
    Vm,
    agent::{self, AgentError},
};
use tokio::{sync::MutexGuard, time::sleep};

use super::{
    Container, Pod, PodError, PodEvent, ProcessExit, SignalScope, Transition,
    kill_clock::{KILL_PATIENCE, KillClock, READER_PATIENCE},
    state::KILLED,
    stdio::Logger,
    streams::Outputs,
};

/// No process has a status above this; a larger claim of the guest is reduced to it.
const MAX_STATUS: u32 = 255;

/// How a container's init has ended.
struct EndedInit {
    exit: ProcessExit,
    logger: Option<Logger>,
    /// Processes were killed because the container was out of memory, and no event has reported it.
    unreported_kill: bool,
    /// Whether the container has written nothing. None: the guest is lost and cannot export the changes.
    unchanged: Option<bool>,
}

impl Pod {
    /// Waits for the end of `container`, delivers its output, and removes what it leaves behind.
    pub(super) async fn watch(
        self,
        container: Arc<Container>,
        agent: agent::Client,
        vm: Vm,
        outputs: Outputs,
    ) {
        let EndedInit { exit, logger, unreported_kill, unchanged } = {
            let mut ending = pin!(self.end_of_init(&container, &agent, &vm, outputs));
            tokio::select! {
                biased;
                ended = &mut ending => ended,
                () = container.kill_clock.reaches(KILL_PATIENCE) => {
                    self.kill_overdue(&container, "the container has not ended").await;
                    ending.await
                }
            }
        };
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

    /// Waits until the init and all other processes of the container have ended and their output is
    /// delivered.
    async fn end_of_init(
        &self,
        container: &Container,
        agent: &agent::Client,
        vm: &Vm,
        outputs: Outputs,
    ) -> EndedInit {
        let (reported, host_kill) = (AtomicU64::new(0), AtomicBool::new(false));
        let waited = async {
            let mut waiting = pin!(agent.wait_process(&container.id, &ProcessRef::Init));
            let watchers = async {
                tokio::join!(self.watch_memory(container, agent, &reported), self.follow_anchor(container))
            };
            let waited = tokio::select! {
                biased;
                waited = &mut waiting => waited,
                ((), ()) = watchers => waiting.await,
            };
            if let Err(error) = &waited {
                // A VM is useless without its agent.
                let exit = match error {
                    AgentError::Closed => vm.end_of_lost().await,
                    _ => vm.kill().await,
                };
                let (reason, out_of_memory) = self.reason_of_loss(exit).await;
                host_kill.store(out_of_memory, Ordering::Relaxed);
                tracing::error!(id = container.id.as_str(), "container lost: {}: {reason}", chain(error));
            }
            waited
        };
        let (waited, exit, logger) =
            finish_process(&container.id, &container.kill_clock, outputs, waited).await;
        let unreported_kill = match &waited {
            Ok(ended) => ended.oom_kills > reported.into_inner(),
            Err(_) => host_kill.into_inner(),
        };
        let unchanged = waited.as_ref().ok().map(|ended| ended.layer_unchanged);
        // The other processes of the container have ended with the init; their exits are reported first.
        container.execs.end().await;
        container.end_anchor().await;
        EndedInit { exit, logger, unreported_kill, unchanged }
    }

    /// Kills the VM of a container that was sent SIGKILL and has not ended in time.
    async fn kill_overdue(&self, container: &Container, what: &str) {
        tracing::error!(
            id = container.id.as_str(),
            "{what} {KILL_PATIENCE:?} after SIGKILL: killing its VM with all containers in it"
        );
        container.vm.kill().await;
    }

    /// Killing the process that stands for a container kills the container.
    async fn follow_anchor(&self, container: &Container) {
        let exit = container.anchor_ended().await;
        tracing::info!(
            id = container.id.as_str(),
            "the container's anchor has ended ({exit}): killing the container"
        );
        let init = SignalScope::One(container.id.init());
        if let Err(error) = self.kill(&init, libc::SIGKILL.cast_unsigned()).await {
            tracing::warn!(
                id = container.id.as_str(),
                "cannot kill the container of an anchor: {}",
                chain(&error)
            );
        }
    }

    /// An out-of-memory kill is reported before the exit that it caused.
    async fn record(&self, container: &Container, exit: ProcessExit, unreported_kill: bool) {
        let _ordered = self.take_turn(container).await;
        if let Err(error) = container.init.advance(Transition::Exited(exit)) {
            tracing::error!(id = container.id.as_str(), "exit reported twice: {error}");
            return;
        }
        if unreported_kill {
            self.emit(PodEvent::OutOfMemory { id: container.id.clone() });
        }
        tracing::info!(id = container.id.as_str(), status = exit.status, "container exited");
        self.emit(PodEvent::Exited { process: container.id.init(), pid: container.pid, exit });
    }

    /// Waits for the requests that change the container's state now. A container that was sent SIGKILL does
    /// not wait long: without its VM, every such request fails.
    async fn take_turn<'a>(&self, container: &'a Container) -> MutexGuard<'a, ()> {
        let overdue = async {
            container.kill_clock.started().await;
            sleep(KILL_PATIENCE).await;
        };
        tokio::select! {
            biased;
            ordered = container.init.transitions.lock() => return ordered,
            () = overdue => {}
        }
        self.kill_overdue(container, "a request for the container has not ended").await;
        container.init.transitions.lock().await
    }

    /// Ends the VM with its last running container; otherwise removes only this container from the guest.
    ///
    /// If the changes are safe on the host (`secure`), the VM has nothing to sync: the disks of containers
    /// that ended earlier were synced when they were deleted.
    async fn clean(&self, container: &Container, agent: &agent::Client, secure: bool) {
        let id = container.id.as_str();
        let clear = async {
            let deleted = agent.delete_container(id).await;
            deleted.map_err(|source| PodError::guest("clean up after", id, source))?;
            container.attachments.detach().await;
            container.shares.remove().await;
            Ok(())
        };
        self.shared.sandbox.release(id, secure, clear).await;
        self.shared.shares.settle().await;
    }
}

/// Waits until a process has ended, which `waited` reports, and delivers its output. The caller waits for the
/// logging program.
pub(super) async fn finish_process(
    id: &str,
    killed: &KillClock,
    outputs: Outputs,
    waited: impl Future<Output = Result<WaitProcessResponse, AgentError>>,
) -> (Result<WaitProcessResponse, AgentError>, ProcessExit, Option<Logger>) {
    let discard = outputs.discard();
    let mut finished = pin!(async {
        let waited = waited.await;
        let (exit, logger) = finish_output(id, outputs, &waited).await;
        (waited, exit, logger)
    });
    tokio::select! {
        biased;
        finished = &mut finished => finished,
        () = killed.reaches(READER_PATIENCE) => {
            discard.now();
            finished.await
        }
    }
}

/// Delivers the rest of a process's output, and returns how the process ended.
async fn finish_output(
    id: &str,
    outputs: Outputs,
    waited: &Result<WaitProcessResponse, AgentError>,
) -> (ProcessExit, Option<Logger>) {
    match waited {
        Ok(ended) => {
            // The guest is not trusted: the time is taken on the host, and the status is bounded.
            let status = ended.exit_status.min(MAX_STATUS);
            let exit = ProcessExit { status, at: SystemTime::now() };
            (exit, outputs.deliver(id, ended).await)
        }
        Err(error) => {
            tracing::debug!(id, "cannot wait for the process: {}", chain(error));
            let logger = outputs.abandon().await;
            (ProcessExit { status: KILLED, at: SystemTime::now() }, logger)
        }
    }
}
