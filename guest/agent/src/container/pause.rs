//! Pausing and resuming a container.

use super::{Container, ContainerError};

impl Container {
    /// Freezes the container's processes, and its root file system when everything written is on the disk.
    ///
    /// # Errors
    /// The container has ended, or the disk cannot be written; the processes continue then.
    pub(crate) async fn pause(&self) -> Result<(), ContainerError> {
        let cgroup = self.running_cgroup()?;
        cgroup.freeze().await?;
        // A change through the view would block on the frozen file system, or alter files that are being
        // exported.
        let read_only = self.view.make_read_only().await.map_err(ContainerError::from);
        let frozen = read_only.and_then(|()| Ok(self.rootfs.freeze()?));
        if frozen.is_err() {
            self.view.make_writable();
            cgroup.thaw()?;
        }
        frozen
    }

    /// Thaws the root file system and the processes.
    ///
    /// # Errors
    /// The container has ended.
    pub(crate) fn resume(&self) -> Result<(), ContainerError> {
        let cgroup = self.running_cgroup()?;
        self.rootfs.thaw()?;
        self.view.make_writable();
        Ok(cgroup.thaw()?)
    }
}
