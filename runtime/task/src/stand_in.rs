//! The end of a process of the host that stands for a process of a container.

use std::{error::Error, os::fd::OwnedFd};

use machinen::{
    pod::{Pod, ProcessId, SignalScope, state::ProcessState},
    sys,
};

/// Kills `process` when its stand-in has ended, unless the process ends first. A process that was added and not
/// started is removed instead.
///
/// # Errors
/// The stand-in cannot be watched, or the process cannot be killed.
pub(crate) async fn kill_after(
    stand_in: OwnedFd,
    pod: &Pod,
    process: &ProcessId,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let stand_in = sys::async_fd(stand_in)?;
    let watched = pod.container(&process.container)?.process(process.exec.as_ref())?;
    tokio::select! {
        _ = watched.exited() => return Ok(()),
        ended = stand_in.readable() => drop(ended?),
    }
    tracing::info!(id = %process, "the process that stands for it has ended: killing it");
    if process.exec.is_some() && watched.state() == ProcessState::Created {
        pod.delete(process).await?;
        return Ok(());
    }
    Ok(pod.kill(&SignalScope::One(process.clone()), libc::SIGKILL.cast_unsigned()).await?)
}
