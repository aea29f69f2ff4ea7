//! The thread that makes a twin, traces it while it lives, and learns how it ends.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use tokio::sync::{oneshot, watch};

use super::{Twin, TwinOriginal};
use crate::{
    process::{Child, ProcessError, ProcessExit},
    sys::{
        self, pidfd,
        ptrace::{Stop, Tracee},
    },
};

/// The twins that this process keeps.
static LIVING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The pids of the twins that this process keeps, and of those that it is making.
pub(in crate::process) fn living() -> Vec<u32> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
}

/// A twin is among the living ones while this exists.
pub(super) struct Living(u32);

impl Living {
    pub(super) fn add(pid: i32) -> Self {
        let pid = pid.cast_unsigned();
        LIVING.lock().unwrap_or_else(PoisonError::into_inner).insert(pid);
        Self(pid)
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        LIVING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

impl Twin {
    /// Makes a twin of `original` and lets it run. Must be called inside a tokio runtime. No other process may trace the original
    /// meanwhile.
    ///
    /// # Errors
    /// The original has ended, cannot be traced, or has what a twin cannot share. No twin is left.
    pub async fn start(self, original: TwinOriginal) -> Result<Child, ProcessError> {
        let program = self.name.to_string_lossy().into_owned();
        let failed = |source| ProcessError::Spawn { program: program.clone(), source };
        let (made, result) = oneshot::channel();
        let (ended, exit) = watch::channel(None);
        let keep = move || match self.make(original) {
            Ok((twin, _living)) => {
                // The receiver may be gone: then nothing holds the twin, and it ends with this thread.
                if made.send(Ok(twin.pid().cast_unsigned())).is_ok() {
                    let exit = until_end(twin);
                    ended.send_replace(Some(exit));
                }
            }
            Err(error) => drop(made.send(Err(error))),
        };
        thread::Builder::new().name("twin".to_owned()).spawn(keep).map_err(failed)?;
        let pid =
            result.await.unwrap_or_else(|_| Err(io::Error::other("its keeper has ended"))).map_err(failed)?;
        // The twin has not been reaped, because its keeper reaps it when its tracing ends.
        let pidfd = pidfd::open(pid).and_then(sys::async_fd).map_err(failed)?;
        Ok(Child::kept(program, pid, Arc::new(pidfd), exit))
    }
}

/// Lets the twin receive its signals until it has ended.
fn until_end(twin: Tracee) -> ProcessExit {
    loop {
        let resumed = match twin.wait() {
            Ok(Stop::Ended(status)) if libc::WIFSIGNALED(status) => {
                return ProcessExit::Signal(libc::WTERMSIG(status));
            }
            Ok(Stop::Ended(status)) => return ProcessExit::Code(libc::WEXITSTATUS(status)),
            Ok(Stop::Signal(signal)) => twin.resume(libc::PTRACE_CONT, signal),
            Ok(Stop::Group) => twin.resume(libc::PTRACE_LISTEN, 0),
            Ok(Stop::Event(_) | Stop::Call) => twin.resume(libc::PTRACE_CONT, 0),
            Err(error) => {
                tracing::error!("cannot wait for a twin: {error}");
                return ProcessExit::Code(-1);
            }
        };
        // It has been killed meanwhile, which the next wait reports.
        drop(resumed);
    }
}
