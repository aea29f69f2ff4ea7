//! Restores a container from a checkpoint, and follows the memory that is fetched while it runs.

use std::sync::Arc;

use machinen_protocol::{
    api,
    secrets::{MOUNT_SOURCE, SECRETS},
};

use super::{Container, ContainerError, create::Places, secrets, stage::MemoryState};
use crate::{
    cgroup::Cgroup,
    console,
    criu::{self, CriuError, Fetching, Restored},
    disk::{Disk, DiskSource},
    engine::{FileMount, MountPoint, Prepared},
    reaper::Reaper,
    stdio::ProcessEnds,
};

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
    places: Places<'a>,
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

    pub(super) fn plan<'a>(&'a self, places: Places<'a>, files: &'a [FileMount]) -> PlannedRestore<'a> {
        PlannedRestore { image: self, places, files }
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
        let Self { image, places: Places { dir, rootfs, copies }, files } = self;
        // The weight that an idle cgroup (cpu.idle) reports cannot be set.
        let is_set = |file: &&api::CgroupFile| file.name != "cpu.weight" || file.content.trim_end() != "0";
        let limits: Vec<_> = image.facts.limits.iter().filter(is_set).cloned().collect();
        cgroup.write_files(&limits)?;
        cgroup.make(&image.facts.cgroups)?;
        criu::make_mount_points(rootfs, prepared.mount_points())?;
        criu::make_points_in_volumes(prepared.points_in_volumes()).await?;
        let secrets = dir.join(criu::SECRETS_DIR);
        if image.facts.mounts.iter().any(|mount| mount.source == MOUNT_SOURCE) {
            secrets::mount_tmpfs(&secrets)?;
            let point = MountPoint { path: SECRETS.into(), is_file: false };
            criu::make_mount_points(rootfs, &[point])?;
        }
        let (volumes, hostname) = (prepared.volumes(), image.hostname.as_str());
        let target =
            criu::RestoreTarget { cgroup, rootfs, dir, files, volumes, copies, secrets: &secrets, hostname };
        let restored =
            criu::restore(reaper, &target, &image.disk, &image.options, &image.facts, stdio).await?;
        Ok(restored)
    }
}
