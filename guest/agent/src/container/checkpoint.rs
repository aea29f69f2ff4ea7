//! Taking a checkpoint of a container, and restoring a container from one.

use std::{
    path::Path,
    sync::{Arc, MutexGuard, PoisonError},
};

use machinen_protocol::api::{self, CheckpointContainerRequest, CheckpointContainerResponse};

use super::{Container, ContainerError, MemoryState};
use crate::{
    cgroup::Cgroup,
    console,
    criu::{self, CriuError, DumpSource, Dumped, Fetching, Restored},
    disk::{Disk, DiskSource},
    engine::{FileMount, Prepared},
    reaper::Reaper,
    stdio::ProcessEnds,
};

impl Container {
    /// Copies the container's memory onto a disk while it runs.
    ///
    /// # Errors
    /// CRIU cannot copy it.
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
        Ok(DumpSource { init: &self.init, cgroup, rootfs: self.rootfs.path(), dir: &self.dir })
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
        let source = self.source()?;
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

impl Container {
    /// Waits in the background until all memory was fetched.
    pub(super) fn follow_fetching(&self, fetching: Fetching) {
        self.memory.send_replace(MemoryState::Pending);
        let (memory, cgroup, init) = (self.memory.clone(), self.cgroup.clone(), Arc::clone(&self.init));
        tokio::spawn(async move {
            let done = tokio::select! {
                biased;
                // No process is left that could touch missing memory.
                () = init.exited() => Ok(()),
                done = fetching.done() => done,
            };
            let state = match done {
                Ok(()) => MemoryState::Complete,
                Err(error) => {
                    // A process that touches missing memory would block forever.
                    if let Err(err) = cgroup.kill() {
                        console::report(&err);
                    }
                    MemoryState::Lost(Arc::new(error))
                }
            };
            memory.send_replace(state);
        });
    }

    /// Returns when the disk from which the container was restored is not needed any more.
    ///
    /// # Errors
    /// Memory is lost, and the container was killed.
    pub(crate) async fn pages_fetched(&self) -> Result<(), ContainerError> {
        let mut memory = self.memory.subscribe();
        match memory.wait_for(|memory| !matches!(memory, MemoryState::Pending)).await.as_deref() {
            Ok(MemoryState::Lost(error)) => Err(ContainerError::PagesLost(Arc::clone(error))),
            // An error means that the container is gone.
            _ => Ok(()),
        }
    }
}

/// A checkpoint that a container is restored from.
#[derive(Debug)]
pub(super) struct RestoreImage {
    disk: Disk,
    options: api::CriuOptions,
    facts: api::CheckpointFacts,
    hostname: String,
}

/// A checkpoint, and the container that it becomes.
#[derive(Debug)]
pub(super) struct PlannedRestore<'a> {
    image: &'a RestoreImage,
    dir: &'a Path,
    rootfs: &'a Path,
    files: &'a [FileMount],
}

impl RestoreImage {
    /// Finds the checkpoint's disk.
    ///
    /// # Errors
    /// The request names no disk, or the disk is not there.
    pub(super) async fn find(disks: &DiskSource, request: api::RestoreFrom) -> Result<Self, ContainerError> {
        let disk = request.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = disks.find_one(disk.into(), true).await.map_err(CriuError::from)?;
        Ok(Self {
            disk,
            options: request.options.unwrap_or_default(),
            facts: request.facts.unwrap_or_default(),
            hostname: request.hostname,
        })
    }

    pub(super) fn plan<'a>(
        &'a self,
        dir: &'a Path,
        rootfs: &'a Path,
        files: &'a [FileMount],
    ) -> PlannedRestore<'a> {
        PlannedRestore { image: self, dir, rootfs, files }
    }
}

impl PlannedRestore<'_> {
    /// Which standard streams of the first process were pipes.
    pub(super) fn pipes(&self) -> [bool; 3] {
        let names = &self.image.facts.descriptors;
        [0, 1, 2].map(|fd| names.get(fd).is_some_and(|name| name.starts_with("pipe:")))
    }

    /// Restores the processes, which do not run yet, into a cgroup with the limits that they had.
    ///
    /// # Errors
    /// A limit cannot be set, or CRIU cannot restore the processes.
    pub(super) async fn run(
        self,
        reaper: &Reaper,
        prepared: &Prepared,
        cgroup: &Cgroup,
        stdio: ProcessEnds,
    ) -> Result<Restored, ContainerError> {
        let Self { image, dir, rootfs, files } = self;
        // The weight that an idle cgroup (cpu.idle) reports cannot be set.
        let is_set = |file: &&api::CgroupFile| file.name != "cpu.weight" || file.content.trim_end() != "0";
        let limits: Vec<_> = image.facts.limits.iter().filter(is_set).cloned().collect();
        cgroup.write_files(&limits)?;
        cgroup.make(&image.facts.cgroups)?;
        criu::make_mount_points(rootfs, prepared.mount_points())?;
        let target = criu::RestoreTarget { cgroup, rootfs, dir, files, hostname: &image.hostname };
        let restored =
            criu::restore(reaper, &target, &image.disk, &image.options, &image.facts, stdio).await?;
        Ok(restored)
    }
}
