//! Holding a container, and letting it go on.

use super::{Container, ContainerError};

impl Container {
    /// Holds its processes, and what they have written is on the disk.
    ///
    /// # Errors
    /// The init has ended, or the disk cannot be written; its processes go on then.
    pub(crate) async fn pause(&self) -> Result<(), ContainerError> {
        let cgroup = self.live_cgroup()?;
        cgroup.freeze().await?;
        // Who changes files through the view would wait for a file system that is held, or change what is being exported.
        let held = self.view.hold().await.map_err(ContainerError::from);
        let held = held.and_then(|()| Ok(self.rootfs.freeze()?));
        if held.is_err() {
            self.view.release();
            cgroup.thaw()?;
        }
        held
    }

    /// # Errors
    /// The init has ended.
    pub(crate) fn resume(&self) -> Result<(), ContainerError> {
        let cgroup = self.live_cgroup()?;
        self.rootfs.thaw()?;
        self.view.release();
        Ok(cgroup.thaw()?)
    }
}
