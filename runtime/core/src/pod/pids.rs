//! The pids under which the host reports a container's processes.
//!
//! Clients look these pids up in the host's /proc: `ctr task ps` and CRI print them, nerdctl and docker run
//! `ps` on them. The pids of the guest's kernel belong to other processes on the host, so a container is
//! reported as its anchor. After a restart containerd treats a container without pids as lost. The answer
//! therefore does not involve the guest, and is the same whether the guest runs, is paused, hangs or has
//! ended.

use super::{ContainerId, Pod, PodError};

impl Pod {
    /// Returns the pids on the host that stand for the processes of a container: that of its anchor.
    ///
    /// # Errors
    /// The container does not exist.
    pub fn pids(&self, id: &ContainerId) -> Result<Vec<u32>, PodError> {
        Ok(vec![self.container(id)?.pid])
    }
}
