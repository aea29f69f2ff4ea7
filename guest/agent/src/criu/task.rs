//! How messages name a process of a container.

use std::{fmt, fs};

use nix::unistd::Pid;
use procfs::process::Process;

/// A process with its pid in the container and its own name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    pub(super) inner: Pid,
    comm: String,
}

impl Task {
    /// None if the process does not exist any more.
    pub(super) fn find(pid: Pid) -> Option<Self> {
        let status = Process::new(pid.as_raw()).and_then(|process| process.status()).ok()?;
        let inner = status.nspid.and_then(|pids| pids.last().copied()).unwrap_or(pid.as_raw());
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        Some(Self { inner: Pid::from_raw(inner), comm: printable(&comm) })
    }
}

/// Replaces control characters: a process chooses its own name.
fn printable(comm: &[u8]) -> String {
    let comm = String::from_utf8_lossy(comm.strip_suffix(b"\n").unwrap_or(comm)).into_owned();
    comm.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.inner, self.comm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_number_and_a_name() {
        let task = Task::find(nix::unistd::getpid()).unwrap();
        assert!(task.inner.as_raw() > 0);
        assert_eq!(Task { comm: printable(b"a\x1b[1m\n"), ..task.clone() }.comm, "a?[1m");
        let shown = Task { inner: Pid::from_raw(7), comm: "sh".into() }.to_string();
        assert_eq!(shown, "process 7 (sh)");
        assert_eq!(Task::find(Pid::from_raw(i32::MAX)), None);
    }
}
