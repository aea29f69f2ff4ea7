//! Removes what a container has left, in the guest.

use std::{fs, io, path::Path, sync::PoisonError};

use super::{Container, ContainerError, secrets, stage::StartStage};
use crate::{
    cgroup::{Cgroup, CgroupError},
    console, criu, engine,
};

impl Container {
    /// Removes a container that does not run. The call may be repeated after an error.
    ///
    /// # Errors
    /// The container runs, or something of it cannot be removed.
    pub(crate) async fn delete(&self) -> Result<(), ContainerError> {
        let never_started =
            matches!(*self.stage.lock().unwrap_or_else(PoisonError::into_inner), StartStage::Created(_));
        if !self.init.has_exited() {
            if !never_started {
                return Err(ContainerError::Running);
            }
            self.cgroup.kill()?;
            self.init.exited().await;
        }
        self.init.close();
        clear(&self.cgroup).await?;
        // The disk from which the container was restored is mounted in the container's directory until the
        // container was started and has all of its memory.
        let pending = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *stage, StartStage::Started)
        };
        drop(pending);
        // The disk to which the container was dumped is mounted there too, if the host has not read all of it.
        drop(self.dumped().take());
        if let Err(err) = self.pages_fetched().await {
            console::report(&err);
        }
        for exec in self.execs.all() {
            exec.close();
        }
        self.view.end().await;
        self.host_disks.release();
        self.copies.unmount()?;
        self.rootfs.sync()?;
        self.rootfs.unmount()?;
        remove_dir(&self.dir)
    }

    /// Writes the container's data to its disk while the VM shuts down. The processes have ended by then.
    pub(crate) fn shut_down(&self) {
        self.host_disks.release();
        self.copies.unmount().unwrap_or_else(|err| console::report(&err));
        if let Err(err) = self.rootfs.unmount() {
            console::report(&err);
        }
    }
}

/// Kills all processes in a cgroup and removes it.
pub(super) async fn clear(cgroup: &Cgroup) -> Result<(), CgroupError> {
    cgroup.kill()?;
    cgroup.remove().await
}

/// Removes the agent's own files. Nothing is mounted below `dir` any more:
/// [`Rootfs::unmount`](super::rootfs::Rootfs::unmount) has removed the mount points, and a mount point that is
/// left makes this fail instead of descending.
pub(super) fn remove_dir(dir: &Path) -> Result<(), ContainerError> {
    criu::clear(dir)?;
    secrets::unmount(&dir.join(criu::SECRETS_DIR))?;
    for path in [dir.join("files"), dir.join(engine::DIR)] {
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ContainerError::State { what: "remove", path, source });
            }
            _ => {}
        }
    }
    fs::remove_dir(dir).map_err(|source| ContainerError::State {
        what: "remove",
        path: dir.to_owned(),
        source,
    })
}
