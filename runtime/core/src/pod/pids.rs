//! The pids under which the host reports a container's processes.
//!
//! Clients look these pids up in the host's /proc: `ctr task ps` and CRI print them, nerdctl and docker run
//! `ps` on them. The pids of the guest's kernel belong to other processes on the host, so a container is
//! reported as its anchor. After a restart containerd treats a container without pids as lost. The answer
//! therefore does not involve the guest, and is the same whether the guest runs, is paused, hangs or has
//! ended.

use super::{Pod, PodError};

/// A host process that stands for a process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostProcess {
    /// The pid of the container's anchor on the host.
    pub pid: u32,
    /// Empty for the container's init.
    pub exec_id: String,
}

impl Pod {
    /// Returns the host processes of a container, the anchor first.
    ///
    /// # Errors
    /// The container does not exist.
    pub fn pids(&self, id: &str) -> Result<Vec<HostProcess>, PodError> {
        let container = self.container(id)?;
        Ok(vec![HostProcess { pid: container.pid, exec_id: String::new() }])
    }
}
