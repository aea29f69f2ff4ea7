//! Whom the kernel may kill when memory runs out while CRIU makes processes.
//!
//! CRIU must not be chosen before what it makes. As every program of the agent's it would not be killed at all, and neither
//! would they: they inherit that, and CRIU gives back only scores other than 0. So it gets one that none of them has asked
//! for, by which those are known that it has left alone.

use std::{fs, io, path::PathBuf};

use nix::unistd::Pid;

use super::CriuError;
use crate::cgroup::Cgroup;

/// The last to be killed. -1000 is nobody, and would leave a cgroup at its limit without anybody to kill.
const LAST: &str = "-999";

/// # Errors
/// Those of the file system; none if the process has ended.
pub(super) fn protect(criu: Pid) -> Result<(), CriuError> {
    write(criu, LAST)
}

/// Gives the processes that CRIU has made, and would run next, the scores that they had.
///
/// # Errors
/// Those of the file system.
pub(super) fn expose(cgroup: &Cgroup, criu: Pid) -> Result<(), CriuError> {
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
