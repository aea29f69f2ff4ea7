//! Takes checkpoints of a container. `restore.rs` has the other half.
//!
//! ```text
//!   a disk for the guest -> freeze, export the layer (unless paused) -> CRIU dumps onto it
//!   -> resumed, unless it is to end -> files hashed and synced (-> verified) -> exit: killed
//! ```
//! The container is ended only after the files are on stable storage. A failure leaves the container as it was.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use machinen_base::fs::{FileError, Links, open_regular};
use machinen_protocol::process::SignalTarget;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Container, ContainerId, Pod, PodError, PodEvent,
    checkpoint_guest::{Dump, DumpOutcome},
    copies::OpenCopy,
    host_disks::HostDiskError,
    phases::PhaseTimes,
    state::{PodRequest, ProcessState},
};
use crate::{
    checkpoint::{
        self, CheckpointError, CheckpointManifest, DumpImages, DumpOptions, FORMAT, SavedCheckpoint,
        StagedCheckpoint,
    },
    spec, traces,
};

/// Number of the guest's reports that may wait for the thread that writes the files.
const WAITING: usize = 2;

/// A request to checkpoint a container.
#[derive(Debug, Clone, Default)]
pub struct CheckpointRequest {
    /// Receives the files. The directory is created, or is empty, or has an earlier checkpoint, which is replaced.
    pub path: PathBuf,
    /// Receives the same files, if the caller names a second directory.
    pub also: Option<PathBuf>,
    /// Receives CRIU's log and statistics.
    pub work: Option<PathBuf>,
    /// End the container when its checkpoint is complete.
    pub exit: bool,
    /// The options of the dump.
    pub options: DumpOptions,
}

impl Pod {
    /// Writes a checkpoint of a running or paused container, together with the changes of its files.
    ///
    /// # Errors
    /// The container does not exist or is not running, CRIU cannot dump it, or the directory cannot be
    /// written. The container continues as before, and nothing of the checkpoint is left.
    pub async fn checkpoint(&self, id: &ContainerId, checkpoint: CheckpointRequest) -> Result<(), PodError> {
        let container = self.container(id)?;
        // Runs in a task of its own: a caller that goes away must not leave a frozen container that is
        // reported as running.
        let pod = self.clone();
        let work = async move {
            let trace = pod.trace("checkpoint", &container.id);
            let phases = PhaseTimes::default();
            let done = pod.checkpoint_whole(&container, &checkpoint, &phases).await;
            trace.end(&done, || phases.spans());
            done
        };
        let task = tokio::spawn(traces::inherit(work));
        task.await.map_err(PodError::Worker)?
    }

    async fn checkpoint_whole(
        &self,
        container: &Container,
        wanted: &CheckpointRequest,
        phases: &PhaseTimes,
    ) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let _none_starting = container.freezing.write().await;
        container.check(PodRequest::Checkpoint)?;
        if let Some(path) = container.host_disk.clone() {
            return Err(HostDiskError::Checkpoint { id: id.to_owned(), path }.into());
        }
        let failed = |source| PodError::Checkpoint { id: id.to_owned(), source };
        let place = prepare(&wanted.path).await?.map_err(failed)?;
        let was_paused = container.state() == ProcessState::Paused;
        let agent = self.agent(id).await?;
        let config = container.bundle.join("config.json");
        let config =
            spawn_blocking(move || read_config(config)).await.map_err(PodError::Worker)?.map_err(failed)?;
        let manifest = manifest(container, wanted.options, &config).map_err(failed)?;
        let dump = Dump::new(self, container, &agent, wanted.options, wanted.exit, !was_paused);
        let DumpOutcome { disk, facts, layer, trial_disk, frozen, connections } = dump.run(phases).await?;
        let kernel_digest = checkpoint::kernel_digest(container.vm.spec());
        let manifest = CheckpointManifest { layer, kernel_digest, ..manifest }
            .with_facts(facts, container.shares.volumes());
        let written = async {
            let manifest = match manifest {
                Ok(manifest) => manifest,
                Err(error) => {
                    disk.release();
                    return Err(failed(error));
                }
            };
            let (located, pieces) = mpsc::channel(WAITING);
            let images = disk.images(pieces);
            let (located, saved) = tokio::join!(
                phases.time("images", dump.locate(&disk, located)),
                save(id, images, manifest, place.dir(), phases),
            );
            disk.release();
            // An error of the guest comes first: the writer fails too when a location is missing.
            located?;
            let SavedCheckpoint { files, bytes } = saved?;
            let verified = match trial_disk {
                Some(trial_disk) => self.verify(container, place.dir(), trial_disk, phases).await,
                None => Ok(()),
            };
            finish(id, wanted, place, verified).await?;
            let path = wanted.path.display();
            tracing::info!(id, files, bytes, %phases, %path, "container checkpointed");
            self.emit(PodEvent::Checkpointed { id: container.id.clone(), path: wanted.path.clone() });
            if wanted.exit {
                let killed =
                    agent.signal_process(id, &SignalTarget::All, libc::SIGKILL.cast_unsigned()).await;
                killed.map_err(|source| PodError::guest("end", id, source))?;
            }
            Ok(())
        };
        let written = written.await;
        if written.is_err() {
            connections.release().await;
        }
        match frozen {
            Some(frozen) if written.is_err() => frozen.thaw().await,
            // The container ends without having run again.
            Some(frozen) => frozen.leave_frozen(),
            None => {}
        }
        written
    }
}

/// Writes the files. After an error none is left.
async fn save(
    id: &str,
    images: DumpImages,
    manifest: CheckpointManifest,
    path: &Path,
    phases: &PhaseTimes,
) -> Result<SavedCheckpoint, PodError> {
    let path = path.to_owned();
    let save = move || checkpoint::save(images, manifest, &path);
    let saved = phases.time("save", async { spawn_blocking(save).await.map_err(PodError::Worker) });
    saved.await?.map_err(|source| PodError::Checkpoint { id: id.to_owned(), source })
}

/// Decides where the files are written, before anything is asked of the guest.
async fn prepare(path: &Path) -> Result<Result<StagedCheckpoint, CheckpointError>, PodError> {
    let path = path.to_owned();
    spawn_blocking(move || StagedCheckpoint::prepare(&path)).await.map_err(PodError::Worker)
}

/// Copies a complete checkpoint to the caller's other directories, and puts it in its place. If `verified` or a copy fails,
/// removes it.
async fn finish(
    id: &str,
    wanted: &CheckpointRequest,
    place: StagedCheckpoint,
    verified: Result<(), PodError>,
) -> Result<(), PodError> {
    let CheckpointRequest { path, also, work, .. } = wanted.clone();
    let id = id.to_owned();
    let finish = move || {
        let also = also.filter(|also| *also != path);
        let copy = || {
            work.map_or(Ok(()), |work| checkpoint::copy_reports(place.dir(), &work))?;
            also.map_or(Ok(()), |also| checkpoint::copy(place.dir(), &also))
        };
        let failed = |source| PodError::Checkpoint { id: id.clone(), source };
        match verified.and_then(|()| copy().map_err(failed)) {
            Ok(()) => place.commit().map_err(failed),
            Err(error) => {
                place.discard();
                Err(error)
            }
        }
    };
    spawn_blocking(finish).await.map_err(PodError::Worker)?
}

/// The part of a configuration that the manifest records.
#[derive(Deserialize)]
struct ConfigHostname {
    #[serde(default)]
    hostname: String,
}

fn read_config(path: PathBuf) -> Result<Vec<u8>, CheckpointError> {
    let mut config = Vec::new();
    open_regular(&path, Links::Follow)
        .and_then(|file| file.take(spec::bundle::MAX_CONFIG).read_to_end(&mut config))
        .map_err(FileError::at("read", path))?;
    Ok(config)
}

fn manifest(
    container: &Container,
    options: DumpOptions,
    config: &[u8],
) -> Result<CheckpointManifest, CheckpointError> {
    let ConfigHostname { hostname } = serde_json::from_slice(config)
        .map_err(|source| CheckpointError::Manifest { path: container.bundle.join("config.json"), source })?;
    Ok(CheckpointManifest {
        format: FORMAT,
        machinen: env!("CARGO_PKG_VERSION").to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        container: container.id.to_string(),
        rootdisk: container.base.map(|key| key.to_string()),
        copies: container.copies.iter().map(OpenCopy::recorded).collect(),
        config: format!("sha256:{:x}", Sha256::digest(config)),
        hostname: Some(hostname),
        terminal: container.init.stdio.terminal,
        options,
        ..CheckpointManifest::default()
    })
}
