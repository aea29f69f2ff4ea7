//! Takes checkpoints of a container.

use std::sync::{MutexGuard, PoisonError};

use machinen_protocol::api::{self, CheckpointContainerRequest, CheckpointContainerResponse};

use super::{Container, ContainerError, stage::MemoryState};
use crate::{
    criu::{self, CriuError, DumpSource, Dumped},
    disk::DiskSource,
    reaper::Reaper,
};

impl Container {
    /// Copies the container's memory onto a disk while it runs.
    ///
    /// # Errors
    /// CRIU cannot copy the memory.
    pub(crate) async fn pre_dump(
        &self,
        reaper: &Reaper,
        disks: &DiskSource,
        request: CheckpointContainerRequest,
    ) -> Result<(), ContainerError> {
        let source = self.source()?;
        if matches!(*self.memory.borrow(), MemoryState::Pending) {
            return Err(ContainerError::PagesPending);
        }
        let disk = request.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = disks.find_one(disk.into(), false).await.map_err(CriuError::from)?;
        let copied = criu::pre_dump(reaper, &source, &disk, &request.options.unwrap_or_default()).await;
        if let Err(CriuError::Corrupted { .. }) = copied {
            source.cgroup.kill()?;
        }
        Ok(copied?)
    }

    /// What CRIU dumps. Images of an earlier dump that the host has not read are dropped: their disk is
    /// mounted where the new one will be.
    fn source(&self) -> Result<DumpSource<'_>, ContainerError> {
        drop(self.dumped().take());
        let cgroup = self.running_cgroup()?;
        let (rootfs, dir) = (self.rootfs.path(), self.dir.as_path());
        let (copies, written) = (self.copies.paths(), self.copies.written());
        Ok(DumpSource { init: &self.init, cgroup, rootfs, dir, copies, written, is_tried: false })
    }

    /// Dumps the container onto a disk. The container stays paused.
    ///
    /// # Errors
    /// The container is not paused, has processes that were added to it, or CRIU cannot dump it.
    pub(crate) async fn checkpoint(
        &self,
        reaper: &Reaper,
        disks: &DiskSource,
        request: CheckpointContainerRequest,
    ) -> Result<CheckpointContainerResponse, ContainerError> {
        let source = DumpSource { is_tried: request.is_tried, ..self.source()? };
        if !source.cgroup.is_frozen() {
            return Err(ContainerError::NotPaused);
        }
        if matches!(*self.memory.borrow(), MemoryState::Pending) {
            return Err(ContainerError::PagesPending);
        }
        let execs = self.running_execs();
        if !execs.is_empty() {
            return Err(ContainerError::HasExecs { execs });
        }
        let disk = request.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = disks.find_one(disk.into(), false).await.map_err(CriuError::from)?;
        // CRIU writes to the root file system for files that have lost their name.
        self.rootfs.thaw()?;
        let options = request.options.unwrap_or_default();
        let dumped = criu::dump(reaper, &source, &disk, &options, request.stdin_bytes).await;
        match dumped {
            // A container with some corrupted processes must not continue.
            Err(CriuError::Corrupted { .. }) => source.cgroup.kill()?,
            _ => self.rootfs.freeze()?,
        }
        let (dumped, response) = dumped?;
        if request.sync_rootfs {
            self.rootfs.sync()?;
        }
        *self.dumped() = Some(dumped);
        Ok(response)
    }

    /// Locates some more images of the last dump on their disk, and reports whether these are the last.
    ///
    /// # Errors
    /// Nothing was dumped, or the images cannot be written back.
    pub(crate) async fn checkpoint_images(&self) -> Result<api::CheckpointImagesResponse, ContainerError> {
        let dumped = self.dumped().take().ok_or(ContainerError::NotDumped)?;
        let (files, rest) = dumped.images().await?;
        let last = rest.is_none();
        *self.dumped() = rest;
        Ok(api::CheckpointImagesResponse { files, last, ..Default::default() })
    }

    pub(super) fn dumped(&self) -> MutexGuard<'_, Option<Dumped>> {
        self.dumped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
