//! What a container's processes are called on the host.
//!
//! Clients look these pids up in the host's /proc: `ctr task ps` and CRI print them, nerdctl and docker run `ps` on
//! them. The pids of the guest's kernel are numbers of other processes there, so a container is shown as the anchor
//! that stands for it. After a restart containerd takes a container without pids for lost, so the answer needs no guest
//! and is the same whether that runs, is paused, hangs or is gone.

use super::{Pod, PodError};

/// A host process that stands for a process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostProcess {
    pub pid: u32,
    /// Empty: the container's init.
    pub exec_id: String,
}

impl Pod {
    /// The host processes of a container, the anchor first.
    ///
    /// # Errors
    /// The container does not exist.
    pub fn pids(&self, id: &str) -> Result<Vec<HostProcess>, PodError> {
        let container = self.container(id)?;
        Ok(vec![HostProcess { pid: container.pid, exec_id: String::new() }])
    }
}
