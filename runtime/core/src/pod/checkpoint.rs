//! Checkpoints of a container: taken while it is frozen, and restored into another container.
//!
//! ```text
//!   checkpoint   a disk for the guest -> freeze, export the layer (unless paused) -> CRIU dumps onto it
//!                -> resumed, unless it is to end -> files hashed and synced (-> verified) -> exit: killed
//!   create       manifest checked -> images are a disk -> CRIU makes the processes, which wait
//!   start        the processes run
//! ```
//! The container is ended only after the files are on stable storage. A failure leaves it as it was.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use machinen_base::{
    error::chain,
    fs::{FileError, Links, open_regular},
    text::printable,
};
use machinen_protocol::{
    api::{CriuOptions, Disk, RestoreFrom},
    process::SignalTarget,
};
use machinen_storage::rootdisk::RootdiskKey;
use machinen_vm::{
    DiskAddress, VmError,
    agent::{self, AgentError},
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use protobuf::MessageField;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Container, ContainerId, Pod, PodError, PodEvent,
    checkpoint_guest::{Dump, DumpOutcome},
    phases::PhaseTimes,
    state::{PodRequest, ProcessState},
};
use crate::{
    checkpoint::{
        self, CheckpointError, CheckpointManifest, DumpImages, DumpOptions, FORMAT, ImageDisk,
        SavedCheckpoint,
    },
    config, spec,
};

/// Number of the guest's reports that may wait for the thread that writes the files.
const WAITING: usize = 2;

/// A request to checkpoint a container.
#[derive(Debug, Clone, Default)]
pub struct CheckpointRequest {
    /// Receives the files. The directory is created, or must be empty.
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
        let task = tokio::spawn(async move { pod.checkpoint_whole(&container, &checkpoint).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn checkpoint_whole(
        &self,
        container: &Container,
        wanted: &CheckpointRequest,
    ) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let _none_starting = container.freezing.write().await;
        container.check(PodRequest::Checkpoint)?;
        let was_paused = container.state() == ProcessState::Paused;
        let agent = self.agent(id).await?;
        let failed = |source| PodError::Checkpoint { id: id.to_owned(), source };
        let config = container.bundle.join("config.json");
        let config =
            spawn_blocking(move || read_config(config)).await.map_err(PodError::Worker)?.map_err(failed)?;
        let manifest = manifest(container, wanted.options, &config).map_err(failed)?;
        let phases = PhaseTimes::default();
        let dump = Dump::new(self, container, &agent, wanted, !was_paused);
        let written = async {
            let DumpOutcome { disk, facts, layer, trial_disk } = dump.run(&phases).await?;
            let manifest = CheckpointManifest { layer, ..manifest }.with_facts(facts);
            let (located, pieces) = mpsc::channel(WAITING);
            let images = disk.images(pieces);
            let (located, saved) = tokio::join!(
                phases.time("images", dump.locate(&disk, located)),
                save(id, images, manifest, &wanted.path, &phases),
            );
            disk.release();
            // An error of the guest comes first: the writer fails too when a location is missing.
            located?;
            let SavedCheckpoint { files, bytes } = saved?;
            let verified = match trial_disk {
                Some(trial_disk) => self.verify(container, &wanted.path, trial_disk, &phases).await,
                None => Ok(()),
            };
            finish(id, wanted, verified).await?;
            let path = wanted.path.display();
            tracing::info!(id, files, bytes, phases = %phases, %path, "container checkpointed");
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
            dump.thaw().await;
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

/// Copies a complete checkpoint to the caller's other directories. If `verified` or a copy fails, removes all
/// of them.
async fn finish(
    id: &str,
    wanted: &CheckpointRequest,
    verified: Result<(), PodError>,
) -> Result<(), PodError> {
    let CheckpointRequest { path, also, work, .. } = wanted.clone();
    let id = id.to_owned();
    let finish = move || {
        let also = also.filter(|also| *also != path);
        let copy = || {
            also.as_ref().map_or(Ok(()), |also| checkpoint::copy(&path, also))?;
            work.map_or(Ok(()), |work| checkpoint::copy_reports(&path, &work)).inspect_err(|_| {
                also.iter().for_each(|also| discard(also));
            })
        };
        let failed = |source| PodError::Checkpoint { id, source };
        verified.and_then(|()| copy().map_err(failed)).inspect_err(|_| discard(&path))
    };
    spawn_blocking(finish).await.map_err(PodError::Worker)?
}

fn discard(dir: &Path) {
    if let Err(error) = checkpoint::remove(dir) {
        tracing::warn!("{}", chain(&error));
    }
}

pub(super) fn guest_disk(address: DiskAddress) -> Disk {
    Disk { target: address.target, lun: address.lun, ..Default::default() }
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
        config: format!("sha256:{:x}", Sha256::digest(config)),
        hostname: Some(hostname),
        terminal: container.init.stdio.terminal,
        options,
        ..CheckpointManifest::default()
    })
}

/// A checkpoint's images that are attached to a VM.
#[derive(Debug)]
pub(super) struct RestoreDisk {
    pub(super) address: DiskAddress,
    pub(super) disk: ImageDisk,
}

impl Container {
    /// Detaches the checkpoint's disk from the VM of a running container when all of the container's memory
    /// has been read from it.
    pub(super) fn release_checkpoint(self: &Arc<Self>, agent: agent::Client) {
        let source = self.checkpoint.lock().expect("no panic while held").take();
        let Some(RestoreDisk { address, disk }) = source else { return };
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let id = container.id.as_str();
            match agent.wait_pages(id).await {
                Ok(()) => tracing::info!(id, "all of the container's memory was fetched from its checkpoint"),
                Err(AgentError::Closed) => return,
                Err(error) => {
                    let why = disk.fault().map_or_else(|| chain(&error), |fault| chain(&fault));
                    tracing::error!(
                        id,
                        "a restored container was killed, because its memory could not be read: {why}"
                    );
                }
            }
            match container.vm.detach_disk(address).await {
                Ok(()) | Err(VmError::Exited(_)) => {}
                Err(error) => {
                    tracing::warn!(id, "cannot detach the checkpoint's disk: {}", chain(&error));
                }
            }
        });
    }
}

/// A checkpoint that a container is to be restored from.
#[derive(Debug, Clone)]
pub(super) struct RestorePlan {
    id: String,
    dir: PathBuf,
    manifest: CheckpointManifest,
}

impl RestorePlan {
    /// Reads the manifest, and makes all checks that need no images.
    pub(super) fn read(id: &str, dir: &Path) -> Result<Self, PodError> {
        let (id, dir) = (id.to_owned(), dir.to_owned());
        match CheckpointManifest::read(&dir) {
            Ok(manifest) => Ok(Self { id, dir, manifest }),
            Err(source) => Err(PodError::Restore { id, dir, source }),
        }
    }

    /// The reason why the guest could not restore the container: damage of the checkpoint, if any was found.
    pub(super) fn refused(&self, disk: &ImageDisk, error: AgentError) -> PodError {
        match disk.fault() {
            Some(fault) => self.failed(fault),
            None => PodError::guest("create", &self.id, error),
        }
    }

    fn failed(&self, source: CheckpointError) -> PodError {
        PodError::Restore { id: self.id.clone(), dir: self.dir.clone(), source }
    }

    /// Checks the base disk, since the processes have files on it open.
    pub(super) fn check_rootfs(&self, base: Option<RootdiskKey>) -> Result<(), PodError> {
        match (&self.manifest.rootdisk, base) {
            (Some(theirs), Some(ours)) if *theirs != ours.to_string() => {
                Err(self.failed(CheckpointError::Rootfs { theirs: printable(theirs), ours }))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.manifest.terminal
    }

    /// `spec` is the new container's, and `cpus` is the number of its VM's CPUs.
    pub(super) fn request(
        &self,
        disk: Option<DiskAddress>,
        config: config::RestoreConfig,
        spec: &Spec,
        cpus: u32,
    ) -> RestoreFrom {
        let options = CriuOptions {
            lazy_pages: config.lazy,
            tcp_close: config.tcp == config::TcpMode::Close,
            ..self.manifest.options.criu()
        };
        let mut facts = self.manifest.facts();
        // The VM of the checkpoint may have had more CPUs.
        for file in &mut facts.limits {
            if let Some(content) = spec::cpus::file_in_guest(&file.name, &file.content, cpus) {
                file.content = format!("{content}\n");
            }
        }
        RestoreFrom {
            disk: disk.map(guest_disk).into(),
            options: MessageField::some(options),
            facts: MessageField::some(facts),
            hostname: changed_hostname(self.manifest.hostname.as_deref(), spec).to_owned(),
            ..Default::default()
        }
    }
}

/// Returns the configured hostname if it differs from that of the checkpoint. Otherwise the hostname that the
/// processes have set stays.
fn changed_hostname<'a>(was: Option<&str>, spec: &'a Spec) -> &'a str {
    let own = spec::has_own(spec, LinuxNamespaceType::Uts);
    match (was, spec.hostname().as_deref()) {
        (Some(was), Some(now)) if own && was != now => now,
        _ => "",
    }
}

/// Opens the images of the checkpoint as a disk.
pub(super) async fn restore_disk(
    restore: Option<&RestorePlan>,
    phases: &PhaseTimes,
) -> Result<Option<ImageDisk>, PodError> {
    let Some(restore) = restore.cloned() else { return Ok(None) };
    let open = move || {
        let disk = ImageDisk::open(&restore.dir, &restore.manifest);
        disk.map_err(|source| restore.failed(source))
    };
    let opened = phases.time("checkpoint", async { spawn_blocking(open).await.map_err(PodError::Worker)? });
    opened.await.map(Some)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxNamespaceBuilder;

    use super::*;

    #[test]
    fn a_hostname_is_set_where_another_is_configured() {
        let spec = |hostname: &str, kind| {
            let mut spec = Spec::default();
            spec.set_hostname(Some(hostname.to_owned()).filter(|name| !name.is_empty()));
            let namespace = LinuxNamespaceBuilder::default().typ(kind).build().unwrap();
            spec.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![namespace]));
            spec
        };
        let own = |hostname| spec(hostname, LinuxNamespaceType::Uts);
        assert_eq!(changed_hostname(Some("a"), &own("b")), "b");
        assert_eq!(changed_hostname(Some(""), &own("b")), "b");
        // The hostname that the processes have set stays.
        assert_eq!(changed_hostname(Some("a"), &own("a")), "");
        assert_eq!(changed_hostname(Some("a"), &own("")), "");
        // A checkpoint of an earlier version does not record the hostname, and the VM's hostname is not the
        // container's.
        assert_eq!(changed_hostname(None, &own("b")), "");
        assert_eq!(changed_hostname(Some("a"), &spec("b", LinuxNamespaceType::Pid)), "");
    }
}
