//! Processes of a container in addition to its init.

use std::time::Duration;

use machinen_protocol::{api, process::ProcessRef};
use nix::unistd::Uid;
use tokio::time::timeout;

use super::{Container, ContainerError};
use crate::{
    context::Context,
    engine::{EngineError, Executed},
    process::{Process, ProcessError, Started},
    stdio::Streams,
};

/// How long an exec waits for the end of the init after its namespaces or its cgroup have begun to disappear.
const END_GRACE: Duration = Duration::from_secs(1);

impl Container {
    /// Runs one more process. A failed call leaves nothing behind.
    ///
    /// # Errors
    /// The container does not run, the exec id is taken, or the process cannot be executed.
    pub(crate) async fn exec(
        &self,
        context: &Context,
        request: api::ExecProcessRequest,
    ) -> Result<(), ContainerError> {
        let stdio = request.stdio.unwrap_or_default();
        // First, so that a refused call leaves no stream behind.
        let streams = Streams::claim(&stdio, &context.unclaimed).await?;
        let reservation = self.execs.reserve(&request.exec_id)?;
        let process =
            self.join_context.process(&request.process, stdio.terminal).map_err(EngineError::from)?;
        let (ends, pending) = streams.ends(Uid::from_raw(process.owner()), [false; 3])?;
        let init = self.init.pid();
        let executed = context.engine.exec(&context.reaper, init, &self.join_context, &process, ends).await;
        let Executed { pid, exit } = match executed {
            Ok(executed) => executed,
            Err(err) => return Err(self.explain_by_end(err).await.into()),
        };
        let ends = match pending.connect() {
            Ok(ends) => ends,
            Err(err) => {
                // The reaper ignores the signal if the process has ended by itself.
                let _ = context.reaper.signal(pid, libc::SIGKILL);
                return Err(err.into());
            }
        };
        let cgroup = self.cgroup.clone();
        let started = Started { pid, exit, ends, cgroup, is_init: false };
        reservation.fill(Process::supervise(started, context.reaper.clone()));
        Ok(())
    }

    /// If the container is ending, that is the cause of the failure, whatever failed first.
    async fn explain_by_end(&self, err: EngineError) -> EngineError {
        match err {
            EngineError::Spec(_) | EngineError::Refused { .. } => err,
            err => timeout(END_GRACE, self.init.exited()).await.map_or(err, |()| EngineError::NotRunning),
        }
    }

    /// The ids of the added processes that have not ended.
    pub(super) fn running_execs(&self) -> Vec<String> {
        let running = self.execs.entries().into_iter().filter(|(_, process)| !process.has_exited());
        running.map(|(id, _)| id).collect()
    }

    /// Removes a process that has ended.
    ///
    /// # Errors
    /// The process runs, or is the init.
    pub(crate) fn delete_process(&self, process: &ProcessRef) -> Result<(), ContainerError> {
        let ProcessRef::Exec(exec_id) = process else { return Err(ContainerError::IsInit) };
        let Some((reservation, process)) = self.execs.take(exec_id)? else { return Ok(()) };
        if !process.has_exited() {
            return Err(ProcessError::Running.into());
        }
        process.close();
        reservation.clear();
        Ok(())
    }
}
