//! Exports what a container has written to its snapshot, for which the VM and its agent must answer.
//! [`machinen_storage::container_disk`] has the disk itself, and lists what removes the disk.
//!
//! ```text
//!   pause    exported; the disk stays, because the container continues
//!   end      exported, or nothing was written -> disk removed
//!            not exported (VM or shim killed, host full) -> disk stays
//! ```

use std::{
    fs::File,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use machinen_base::error::chain;
use machinen_storage::{
    container_disk::{ContainerDisk, PendingDisk},
    layer::{self, LayerError, LayerLimits, LayerTarget, PreviousLayer},
};
use machinen_vm::{Vm, agent};
use tokio::{
    task::spawn_blocking,
    time::{Duration, timeout},
};

use super::{
    PodError,
    receive::{ExportLimits, ReceiveError, receive},
    rootfs::RootfsPlan,
};
use crate::config::Config;

/// Opens the disk that an earlier container on the same snapshot has left, or creates one.
pub(super) async fn open_disk(plan: &RootfsPlan, config: &Config) -> Result<(File, PendingDisk), PodError> {
    let (disk, options) = (plan.disk.clone(), config.rootdisk.container_disks());
    Ok(spawn_blocking(move || disk.open(&options)).await.map_err(PodError::Worker)??)
}

/// Returns a disk with the content that the container's disk had at its checkpoint, for a VM that writes to
/// it. `copy` is the copy of [`WritableLayer::only_disk`]. Without it the snapshot has all of the content,
/// and the caller keeps `upper` from being exchanged.
pub(super) async fn trial_disk(
    plan: &RootfsPlan,
    config: &Config,
    copy: Option<File>,
) -> Result<File, PodError> {
    if let Some(copy) = copy {
        return Ok(copy);
    }
    let (disk, options) = (plan.disk.clone(), config.rootdisk.container_disks());
    Ok(spawn_blocking(move || disk.unnamed(&options)).await.map_err(PodError::Worker)??)
}

/// The layer of a container that exists.
#[derive(Debug)]
pub(super) struct WritableLayer {
    disk: ContainerDisk,
    limits: ExportLimits,
    /// One export at a time.
    exporting: tokio::sync::Mutex<()>,
    /// The directory that the container was started with, once a pause has replaced it. A whole root file system is made of
    /// it again, since it has nothing that the container has removed after the pause.
    first: Mutex<Option<PreviousLayer>>,
}

/// Proof that the snapshot has everything that the container has written.
#[derive(Debug)]
pub(super) struct ExportedLayer {
    /// The previous content of the snapshot, if it was exchanged.
    replaced: Option<PreviousLayer>,
}

impl WritableLayer {
    pub(super) fn new(disk: ContainerDisk, config: &Config) -> Self {
        let layer = LayerLimits {
            entries: config.rootdisk.layer_max_entries,
            bytes: config.rootdisk.writable_size_mib << 20,
            reserve: config.rootdisk.reserve(),
        };
        let time = Duration::from_secs(config.rootdisk.export_timeout_s);
        let limits = ExportLimits { layer, time };
        Self { disk, limits, exporting: tokio::sync::Mutex::default(), first: Mutex::default() }
    }

    /// The path of the disk, if the container's changes exist nowhere else.
    pub(super) fn only_disk(&self) -> Option<&Path> {
        self.disk.target().is_none().then_some(self.disk.path())
    }

    /// Keeps the snapshot unchanged until the guard is dropped.
    pub(super) async fn hold(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.exporting.lock().await
    }

    /// The identity of the directory with the layer; see [`layer::identity`].
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(super) fn identity(&self) -> Result<Option<String>, LayerError> {
        self.disk.target().map(|target| layer::identity(target.path())).transpose()
    }

    /// Copies what the container has written to its snapshot. The container has ended, or its processes are
    /// frozen. The export fails when `killed` resolves.
    ///
    /// # Errors
    /// The export failed; the snapshot is unchanged.
    pub(super) async fn export(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        killed: impl Future<Output = ()>,
    ) -> Result<Option<ExportedLayer>, ReceiveError> {
        if self.disk.target().is_none() {
            return Ok(None);
        }
        let turn = timeout(self.limits.time, self.exporting.lock());
        let _one = turn.await.map_err(|_| ReceiveError::Deadline { limit: self.limits.time })?;
        let before = self.first().as_ref().map(PreviousLayer::files).transpose()?;
        let stored = receive(vm, agent, id, (self.disk.clone(), before), self.limits, killed).await?;
        let Some((applied, replaced)) = stored else { return Ok(None) };
        tracing::info!(
            id,
            entries = applied.entries,
            bytes = applied.bytes,
            "the container's writes are in its snapshot"
        );
        Ok(Some(ExportedLayer { replaced: Some(replaced) }))
    }

    fn first(&self) -> MutexGuard<'_, Option<PreviousLayer>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Like [`WritableLayer::export`], for a container that continues afterwards.
    ///
    /// # Errors
    /// The export failed; the snapshot is unchanged.
    pub(super) async fn export_at_pause(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        killed: impl Future<Output = ()>,
    ) -> Result<(), ReceiveError> {
        let exported = self.export(vm, agent, id, killed).await?;
        let stays =
            matches!(self.disk.target(), Some(LayerTarget::InPlace(_) | LayerTarget::MountedUpper { .. }));
        if let Some(replaced) = exported.and_then(|exported| exported.replaced).filter(|_| !stays) {
            self.first().get_or_insert(replaced);
        }
        Ok(())
    }

    /// Like [`WritableLayer::export`], for a container that has ended. A failure is logged, and the changes
    /// stay on the disk.
    pub(super) async fn export_at_end(
        &self,
        vm: &Vm,
        agent: &agent::Client,
        id: &str,
        unchanged: bool,
    ) -> Option<ExportedLayer> {
        if unchanged && self.disk.is_clean() {
            return Some(ExportedLayer { replaced: None });
        }
        let never = std::future::pending();
        self.export(vm, agent, id, never).await.unwrap_or_else(|error| {
            let disk = self.disk.path().display();
            tracing::error!(
                id,
                "the container's writes could not be exported to its snapshot and are kept in {disk}: {}",
                chain(&error)
            );
            None
        })
    }

    /// Waits until the exported files are on stable storage and removes the previous content of the snapshot.
    /// Returns whether the disk is no longer needed.
    pub(super) async fn secure(&self, saved: Option<ExportedLayer>) -> bool {
        let Some(saved) = saved else { return false };
        // Without an exchange there is nothing to sync, and no thread is needed.
        let Some(replaced) = saved.replaced else { return true };
        match spawn_blocking(move || replaced.sync()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::warn!(disk = %self.disk.path().display(), "a container's disk is kept: {}", chain(&error));
                false
            }
            Err(error) => {
                tracing::warn!(disk = %self.disk.path().display(), "a container's disk is kept: {error}");
                false
            }
        }
    }

    /// Removes the disk, which is no longer used. A failure is logged: the next start on the snapshot uses the
    /// disk.
    pub(super) async fn discard_disk(&self) {
        let disk = self.disk.clone();
        match spawn_blocking(move || disk.discard()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("{}", chain(&error)),
            Err(error) => {
                let disk = self.disk.path().display();
                tracing::warn!(%disk, "cannot remove a container's disk: {error}");
            }
        }
    }
}
