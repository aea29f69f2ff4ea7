//! Ends processes that are not children of this one.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::sys;

/// Kills the process `pid` if `is_ours` confirms that it is the right one, and waits until it has ended. It
/// is not an error if there is no such process.
///
/// A pidfd refers to the process before `is_ours` is called, so another process that gets the same pid is
/// never killed.
///
/// # Errors
/// The kernel refuses, or the process has not ended within `deadline`.
pub fn kill_foreign(pid: u32, is_ours: impl FnOnce() -> bool, deadline: Duration) -> io::Result<()> {
    let pidfd = match sys::pidfd::open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        result => result?,
    };
    if !is_ours() {
        return Ok(());
    }
    match sys::pidfd::send_signal(pidfd.as_fd(), Signal::SIGKILL) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        result => result?,
    }
    let timeout = PollTimeout::try_from(deadline).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout)? {
        0 => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {pid} does not end after SIGKILL")))
        }
        _ => Ok(()),
    }
}

/// Returns when the process `pid` has ended; at once if there is none, or if `is_ours` says that it is another one.
///
/// # Errors
/// The process cannot be watched.
pub async fn foreign_end(pid: u32, is_ours: impl FnOnce() -> bool) -> io::Result<()> {
    let pidfd = match sys::pidfd::open(pid) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        result => sys::async_fd(result?)?,
    };
    if is_ours() {
        // The borrow of the readiness ends here: a pidfd stays readable.
        drop(pidfd.readable().await?);
    }
    Ok(())
}

/// A descriptor that is readable when the process `pid` has ended (pidfd_open(2)), which must be a child that has not been reaped.
///
/// # Errors
/// There is no such process.
pub fn watch_end(pid: u32) -> io::Result<OwnedFd> {
    sys::pidfd::open(pid)
}

/// Has the kernel reap the children of this process from now on (SIGCHLD ignored: wait(2)).
///
/// # Errors
/// Those of sigaction(2).
pub fn ignore_children() -> io::Result<()> {
    sys::ignore_children()
}

/// Waits until all of these processes have ended. False: one of them still runs after `deadline`.
///
/// # Errors
/// A process cannot be watched.
pub fn await_ends(pids: &[u32], deadline: Duration) -> io::Result<bool> {
    let end = Instant::now() + deadline;
    for &pid in pids {
        let pidfd = match sys::pidfd::open(pid) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            result => result?,
        };
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now()));
        let left = left.map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], left)? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Spawn;

    #[tokio::test]
    async fn only_the_right_process_is_killed() {
        let child = Spawn::new("sleep").args(["100"]).start().unwrap();
        kill_foreign(child.pid(), || false, Duration::from_secs(5)).unwrap();
        assert_eq!(child.try_exit(), None);
        kill_foreign(child.pid(), || true, Duration::from_secs(5)).unwrap();
        assert_eq!(child.exited().await, crate::process::ProcessExit::Signal(libc::SIGKILL));
        kill_foreign(child.pid(), || true, Duration::from_secs(5)).unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_process_is_an_event() {
        let child = Spawn::new("sleep").args(["100"]).start().unwrap();
        let (pid, short) = (child.pid(), Duration::from_millis(10));
        tokio::time::timeout(short, foreign_end(pid, || true)).await.unwrap_err();
        foreign_end(pid, || false).await.unwrap();
        child.signal(Signal::SIGKILL).unwrap();
        foreign_end(pid, || true).await.unwrap();
        foreign_end(0x7fff_fff0, || true).await.unwrap();
    }

    #[tokio::test]
    async fn the_ends_of_processes_are_awaited() {
        let child = Spawn::new("sleep").args(["100"]).start().unwrap();
        assert!(!await_ends(&[child.pid()], Duration::from_millis(10)).unwrap());
        child.signal(Signal::SIGKILL).unwrap();
        assert!(await_ends(&[child.pid(), 0x7fff_fff0], Duration::from_secs(20)).unwrap());
    }
}
