//! Processes of a container beside its init.

use std::time::Duration;

use machinen_protocol::api;
use nix::unistd::{Pid, Uid};
use tokio::time::timeout;

use super::{Container, ContainerError};
use crate::{
    agent::Parts,
    engine::{EngineError, Executed},
    process::{Process, ProcessError, Started},
    stdio::Streams,
};

/// How long the end of an init may take to be seen after its namespaces and its cgroup have begun to go.
const END_GRACE: Duration = Duration::from_secs(1);

impl Container {
    /// Runs one more process. Nothing of it is left when this fails.
    ///
    /// # Errors
    /// The container does not run, the exec id is taken, or the process cannot be executed.
    pub(crate) async fn exec(
        &self,
        parts: &Parts,
        request: api::ExecProcessRequest,
    ) -> Result<Pid, ContainerError> {
        let stdio = request.stdio.unwrap_or_default();
        // First of all, so that a refused call leaves no stream behind.
        let streams = Streams::claim(&stdio, &parts.unclaimed).await?;
        let place = self.execs.reserve(&request.exec_id)?;
        let process = self.tenancy.process(&request.process, stdio.terminal).map_err(EngineError::from)?;
        let (ends, pending) = streams.ends(Uid::from_raw(process.owner()), [false; 3])?;
        let init = self.init.pid();
        let executed = parts.engine.exec(&parts.reaper, init, &self.tenancy, &process, ends).await;
        let Executed { pid, exit } = match executed {
            Ok(executed) => executed,
            Err(err) => return Err(self.blame_end(err).await.into()),
        };
        let ends = match pending.connect() {
            Ok(ends) => ends,
            Err(err) => {
                // It may have ended by itself by now; the reaper knows.
                let _ = parts.reaper.signal(pid, libc::SIGKILL);
                return Err(err.into());
            }
        };
        let cgroup = self.cgroup.clone();
        let started = Started { pid, exit, ends, cgroup, is_init: false };
        place.fill(Process::supervise(started, parts.reaper.clone()));
        Ok(pid)
    }

    /// Where the container is just ending, that is the reason for whatever failed first.
    async fn blame_end(&self, err: EngineError) -> EngineError {
        match err {
            EngineError::Spec(_) | EngineError::Refused { .. } => err,
            err => timeout(END_GRACE, self.init.exited()).await.map_or(err, |()| EngineError::NotRunning),
        }
    }

    /// The ids of the processes beside the init that have not ended.
    pub(super) fn running_execs(&self) -> Vec<String> {
        let running = self.execs.entries().into_iter().filter(|(_, process)| !process.has_exited());
        running.map(|(id, _)| id).collect()
    }

    /// Forgets a process that has ended.
    ///
    /// # Errors
    /// It runs, or is the init.
    pub(crate) fn delete_process(&self, exec_id: &str) -> Result<(), ContainerError> {
        if exec_id.is_empty() {
            return Err(ContainerError::IsInit);
        }
        let Some((place, process)) = self.execs.take(exec_id)? else { return Ok(()) };
        if !process.has_exited() {
            return Err(ProcessError::Running.into());
        }
        process.close();
        place.clear();
        Ok(())
    }
}
