//! Which process the OOM killer chooses while CRIU restores processes.
//!
//! CRIU must not be chosen before the processes that it restores. With the agent's score, the OOM killer
//! would choose neither CRIU nor them, since they inherit the score and CRIU restores only scores other than
//! 0. So CRIU gets a score that no process has asked for: a process that still has it after the restore had 0
//! before.

use std::{fs, io, path::PathBuf};

use nix::unistd::Pid;

use super::CriuError;
use crate::cgroup::Cgroup;

/// The score of the process that is killed last. With -1000, a cgroup at its limit would have no process to
/// kill.
const LAST: &str = "-999";

/// Protects CRIU from the OOM killer.
///
/// # Errors
/// Those of the file system; a process that has ended is not an error.
pub(super) fn protect(criu: Pid) -> Result<(), CriuError> {
    write(criu, LAST)
}

/// Gives the restored processes, which do not run yet, the scores that they had.
///
/// # Errors
/// Those of the file system.
pub(super) fn restore_scores(cgroup: &Cgroup, criu: Pid) -> Result<(), CriuError> {
    for pid in cgroup.pids()?.into_iter().filter(|pid| *pid != criu) {
        if fs::read_to_string(path(pid)).is_ok_and(|score| score.trim() == LAST) {
            write(pid, "0")?;
        }
    }
    Ok(())
}

fn path(pid: Pid) -> PathBuf {
    format!("/proc/{pid}/oom_score_adj").into()
}

fn write(pid: Pid, score: &str) -> Result<(), CriuError> {
    match fs::write(path(pid), score) {
        Err(source)
            if source.kind() != io::ErrorKind::NotFound && source.raw_os_error() != Some(libc::ESRCH) =>
        {
            Err(CriuError::File { what: "write", path: path(pid), source })
        }
        _ => Ok(()),
    }
}
