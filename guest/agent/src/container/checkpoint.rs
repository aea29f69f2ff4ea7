//! A container's checkpoint, and a container that goes on from one.

use std::{
    path::Path,
    sync::{Arc, MutexGuard, PoisonError},
};

use machinen_protocol::api::{self, CheckpointContainerRequest, CheckpointContainerResponse};

use super::{Container, ContainerError, FileMount, Pages};
use crate::{
    agent::Parts,
    cgroup::Cgroup,
    criu::{self, CriuError, Dumped, Fetching, Restored, Source},
    disk::Disk,
    engine::Prepared,
    stdio::ProcessEnds,
};

impl Container {
    /// Copies its memory onto a disk while it runs.
    ///
    /// # Errors
    /// CRIU cannot.
    pub(crate) async fn pre_dump(
        &self,
        parts: &Parts,
        request: CheckpointContainerRequest,
    ) -> Result<(), ContainerError> {
        let source = self.source()?;
        if matches!(*self.pages.borrow(), Pages::Pending) {
            return Err(ContainerError::PagesPending);
        }
        let disk = request.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = parts.disks.find_one(disk.into(), false).await.map_err(CriuError::from)?;
        let copied =
            criu::pre_dump(&parts.reaper, &source, &disk, &request.options.unwrap_or_default()).await;
        if let Err(CriuError::Harmed { .. }) = copied {
            source.cgroup.kill()?;
        }
        Ok(copied?)
    }

    /// What CRIU is to dump. What it has dumped before, and nobody has asked for, is in the way.
    fn source(&self) -> Result<Source<'_>, ContainerError> {
        drop(self.dumped().take());
        let cgroup = self.live_cgroup()?;
        Ok(Source { init: &self.init, cgroup, rootfs: self.rootfs.path(), dir: &self.dir })
    }

    /// Dumps it onto a disk; it stays paused.
    ///
    /// # Errors
    /// It is not paused, has more processes than those below its init, or CRIU cannot.
    pub(crate) async fn checkpoint(
        &self,
        parts: &Parts,
        request: CheckpointContainerRequest,
    ) -> Result<CheckpointContainerResponse, ContainerError> {
        let source = self.source()?;
        if !source.cgroup.is_frozen() {
            return Err(ContainerError::NotPaused);
        }
        if matches!(*self.pages.borrow(), Pages::Pending) {
            return Err(ContainerError::PagesPending);
        }
        let execs = self.running_execs();
        if !execs.is_empty() {
            return Err(ContainerError::HasExecs { execs });
        }
        let disk = request.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = parts.disks.find_one(disk.into(), false).await.map_err(CriuError::from)?;
        // CRIU writes to the root file system where a file has lost its name.
        self.rootfs.thaw()?;
        let options = request.options.unwrap_or_default();
        let dumped = criu::dump(&parts.reaper, &source, &disk, &options, request.stdin_bytes).await;
        match dumped {
            // Half a container is worse than none.
            Err(CriuError::Harmed { .. }) => source.cgroup.kill()?,
            _ => self.rootfs.freeze()?,
        }
        let (dumped, response) = dumped?;
        if request.sync_rootfs {
            self.rootfs.sync()?;
        }
        *self.dumped() = Some(dumped);
        Ok(response)
    }

    /// Where on its disk some more of the last dump is, and whether that is the last.
    ///
    /// # Errors
    /// There is none, or those of writing it back.
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
    /// Follows the memory that it gets by and by.
    pub(super) fn fetch(&self, fetching: Fetching) {
        self.pages.send_replace(Pages::Pending);
        let (pages, cgroup, init) = (self.pages.clone(), self.cgroup.clone(), Arc::clone(&self.init));
        tokio::spawn(async move {
            let done = tokio::select! {
                biased;
                // Nobody is left who could touch what is missing.
                () = init.exited() => Ok(()),
                done = fetching.done() => done,
            };
            let state = match done {
                Ok(()) => Pages::Here,
                Err(error) => {
                    // Who touches what is missing would wait for ever.
                    if let Err(err) = cgroup.kill() {
                        crate::console::say(&crate::console::chain(&err));
                    }
                    Pages::Lost(Arc::new(error))
                }
            };
            pages.send_replace(state);
        });
    }

    /// Returns when the disk that it was restored from is not needed any more.
    ///
    /// # Errors
    /// Memory is lost, and the container with it.
    pub(crate) async fn pages_fetched(&self) -> Result<(), ContainerError> {
        let mut pages = self.pages.subscribe();
        match pages.wait_for(|pages| !matches!(pages, Pages::Pending)).await.as_deref() {
            Ok(Pages::Lost(error)) => Err(ContainerError::PagesLost(Arc::clone(error))),
            // An error is the end of the container.
            _ => Ok(()),
        }
    }
}

/// A checkpoint to go on from.
#[derive(Debug)]
pub(super) struct From {
    disk: Disk,
    options: api::CriuOptions,
    facts: api::CheckpointFacts,
    hostname: String,
}

/// Where that is to be.
#[derive(Debug)]
pub(super) struct Place<'a> {
    from: &'a From,
    dir: &'a Path,
    rootfs: &'a Path,
    files: &'a [FileMount],
}

impl From {
    /// # Errors
    /// No disk is named, or it is not there.
    pub(super) async fn find(parts: &Parts, from: api::RestoreFrom) -> Result<Self, ContainerError> {
        let disk = from.disk.as_ref().ok_or(ContainerError::NoCheckpointDisk)?;
        let disk = parts.disks.find_one(disk.into(), true).await.map_err(CriuError::from)?;
        Ok(Self {
            disk,
            options: from.options.unwrap_or_default(),
            facts: from.facts.unwrap_or_default(),
            hostname: from.hostname,
        })
    }

    pub(super) fn place<'a>(&'a self, dir: &'a Path, rootfs: &'a Path, files: &'a [FileMount]) -> Place<'a> {
        Place { from: self, dir, rootfs, files }
    }
}

impl Place<'_> {
    /// Which of its standard streams were pipes.
    pub(super) fn pipes(&self) -> [bool; 3] {
        let names = &self.from.facts.descriptors;
        [0, 1, 2].map(|fd| names.get(fd).is_some_and(|name| name.starts_with("pipe:")))
    }

    /// Processes that have not run yet, in a cgroup with the limits that they had.
    ///
    /// # Errors
    /// A limit cannot be set, or CRIU cannot restore.
    pub(super) async fn restore(
        self,
        parts: &Parts,
        prepared: &Prepared,
        cgroup: &Cgroup,
        stdio: ProcessEnds,
    ) -> Result<Restored, ContainerError> {
        let Self { from, dir, rootfs, files } = self;
        // What an idle cgroup (cpu.idle) says of its weight cannot be set.
        let is_set = |file: &&api::CgroupFile| file.name != "cpu.weight" || file.content.trim_end() != "0";
        let limits: Vec<_> = from.facts.limits.iter().filter(is_set).cloned().collect();
        cgroup.write_files(&limits)?;
        cgroup.make(&from.facts.cgroups)?;
        criu::make_mount_points(rootfs, prepared.mount_points())?;
        let place = criu::Place { cgroup, rootfs, dir, files, hostname: &from.hostname };
        let restored =
            criu::restore(&parts.reaper, &place, &from.disk, &from.options, &from.facts, stdio).await?;
        Ok(restored)
    }
}
