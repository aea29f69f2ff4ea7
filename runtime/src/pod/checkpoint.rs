//! A container's checkpoint: taken while it stands still, and gone on from by another.
//!
//! ```text
//!   checkpoint   a disk for the guest -> freeze, export the layer (unless paused) -> CRIU dumps onto it
//!                -> goes on, unless it is to end -> read, hashed, synced to the directory (-> tried out) -> exit: killed
//!   create       manifest understood -> images are a disk -> CRIU makes the processes, which wait
//!   start        they run
//! ```
//! Until the files are on the medium nothing has happened to the container: a failure leaves it as it was.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use machinen_protocol::api::{CriuOptions, Disk, RestoreFrom};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use protobuf::MessageField;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    Container, Event, Pod, PodError,
    dump::{Dumped, Taking},
    phases::Phases,
    state::{State, StateError},
};
use crate::{
    agent::{self, AgentError},
    checkpoint::{self, CheckpointError, FORMAT, ImageDisk, Images, Manifest, Options, Saved},
    config,
    error::chain,
    rootdisk::RootdiskKey,
    spec,
    vm::{DiskAddress, VmError},
};

/// Answers of the guest on their way to who writes the files.
const WAITING: usize = 2;

/// A request to checkpoint a container.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    /// Gets the files; made unless it is there and empty.
    pub path: PathBuf,
    /// Gets the same files, where the caller names another place.
    pub also: Option<PathBuf>,
    /// Gets CRIU's log and statistics.
    pub work: Option<PathBuf>,
    /// End the container when its checkpoint is complete.
    pub exit: bool,
    pub options: Options,
}

impl Pod {
    /// Writes a checkpoint of a container that runs or is paused, together with what it has written.
    ///
    /// # Errors
    /// It does not exist or run, CRIU cannot dump it, or the directory cannot be written: the container goes on as before,
    /// and nothing of the checkpoint is left.
    pub async fn checkpoint(&self, id: &str, checkpoint: Checkpoint) -> Result<(), PodError> {
        let container = self.container(id)?;
        // In a task of its own: a caller that goes away must not leave a frozen container that is said to run.
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.checkpoint_whole(&container, &checkpoint).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn checkpoint_whole(&self, container: &Container, wanted: &Checkpoint) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let _none_starting = container.freezing.write().await;
        let refused = |source| Err(PodError::state("checkpoint", id, source));
        let was_paused = match container.state() {
            State::Running => false,
            State::Paused => true,
            State::Created => return refused(StateError::NotStarted),
            State::Stopped(_) => return refused(StateError::AlreadyStopped),
        };
        let agent = self.agent(id).await?;
        let failed = |source| PodError::Checkpoint { id: id.to_owned(), source };
        let manifest = manifest(container, wanted.options).map_err(failed)?;
        let phases = Phases::default();
        let taking = Taking::new(self, container, &agent, wanted, !was_paused);
        let written = async {
            let Dumped { attached, facts, layer, twin } = taking.dumped(&phases).await?;
            let manifest = Manifest { layer, ..manifest }.with_facts(facts);
            let (located, pieces) = mpsc::channel(WAITING);
            let images = attached.images(pieces);
            let (located, saved) = tokio::join!(
                phases.time("images", taking.locate(&attached, located)),
                save(id, images, manifest, &wanted.path, &phases),
            );
            attached.release();
            // What was not located cannot be saved.
            located?;
            let Saved { files, bytes } = saved?;
            let tried = match twin {
                Some(twin) => self.verify(container, &wanted.path, twin, &phases).await,
                None => Ok(()),
            };
            finish(id, wanted, tried).await?;
            let path = wanted.path.display();
            tracing::info!(id, files, bytes, phases = %phases, %path, "container checkpointed");
            self.emit(Event::Checkpointed { id: id.to_owned(), path: wanted.path.clone() });
            if wanted.exit {
                let killed = agent.signal_process(id, "", libc::SIGKILL.cast_unsigned(), true).await;
                killed.map_err(|source| PodError::guest("end", id, source))?;
            }
            Ok(())
        };
        let written = written.await;
        if written.is_err() {
            taking.let_go().await;
        }
        written
    }
}

/// Writes the files. On an error none is left.
async fn save(
    id: &str,
    images: Images,
    manifest: Manifest,
    path: &Path,
    phases: &Phases,
) -> Result<Saved, PodError> {
    let path = path.to_owned();
    let save = move || checkpoint::save(images, manifest, &path);
    let saved = phases.time("save", async { spawn_blocking(save).await.map_err(PodError::Worker) });
    saved.await?.map_err(|source| PodError::Checkpoint { id: id.to_owned(), source })
}

/// Puts a checkpoint that is written, and was `tried`, where else the caller wants it. On an error none is left.
async fn finish(id: &str, wanted: &Checkpoint, tried: Result<(), PodError>) -> Result<(), PodError> {
    let Checkpoint { path, also, work, .. } = wanted.clone();
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
        tried.and_then(|()| copy().map_err(failed)).inspect_err(|_| discard(&path))
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

/// What is told of a configuration.
#[derive(Deserialize)]
struct Named {
    #[serde(default)]
    hostname: String,
}

fn manifest(container: &Container, options: Options) -> Result<Manifest, CheckpointError> {
    let path = container.bundle.join("config.json");
    let config = fs::read(&path).map_err(|source| CheckpointError::File {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let Named { hostname } = serde_json::from_slice(&config)
        .map_err(|source| CheckpointError::Manifest { path: path.clone(), source })?;
    Ok(Manifest {
        format: FORMAT,
        machinen: env!("CARGO_PKG_VERSION").to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        container: container.id.clone(),
        rootdisk: container.base.map(|key| key.to_string()),
        config: format!("sha256:{:x}", Sha256::digest(&config)),
        hostname: Some(hostname),
        terminal: container.init.stdio.terminal,
        options,
        ..Manifest::default()
    })
}

/// A checkpoint in a VM.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) address: DiskAddress,
    pub(super) disk: ImageDisk,
}

impl Container {
    /// Takes the disk with the checkpoint out of the VM of a container that runs, when it has all of its memory.
    pub(super) fn release_checkpoint(self: &Arc<Self>, agent: agent::Client) {
        let source = self.checkpoint.lock().expect("no panic while held").take();
        let Some(Source { address, disk }) = source else { return };
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let id = container.id.as_str();
            match agent.wait_pages(id).await {
                Ok(()) => tracing::info!(id, "all of the container's memory was fetched from its checkpoint"),
                Err(AgentError::Closed) => return,
                Err(error) => {
                    let why = disk.fault().map_or_else(|| chain(&error), |fault| chain(&fault));
                    tracing::error!(id, "a restored container has lost memory, and was killed: {why}");
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

/// A checkpoint that a container is to go on from.
#[derive(Debug, Clone)]
pub(super) struct Restore {
    id: String,
    dir: PathBuf,
    manifest: Manifest,
}

impl Restore {
    /// Everything about it that can be refused without reading its images.
    pub(super) fn read(id: &str, dir: &Path) -> Result<Self, PodError> {
        let (id, dir) = (id.to_owned(), dir.to_owned());
        match Manifest::read(&dir) {
            Ok(manifest) => Ok(Self { id, dir, manifest }),
            Err(source) => Err(PodError::Restore { id, dir, source }),
        }
    }

    /// Why the guest could not restore it: what is wrong with the checkpoint, if anything is.
    pub(super) fn refused(&self, disk: &ImageDisk, error: AgentError) -> PodError {
        match disk.fault() {
            Some(fault) => self.failed(fault),
            None => PodError::guest("create", &self.id, error),
        }
    }

    fn failed(&self, source: CheckpointError) -> PodError {
        PodError::Restore { id: self.id.clone(), dir: self.dir.clone(), source }
    }

    /// Its processes have files of that disk open.
    pub(super) fn check_rootfs(&self, base: Option<RootdiskKey>) -> Result<(), PodError> {
        match (&self.manifest.rootdisk, base) {
            (Some(theirs), Some(ours)) if *theirs != ours.to_string() => {
                Err(self.failed(CheckpointError::Rootfs { theirs: theirs.clone(), ours }))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.manifest.terminal
    }

    /// `spec` is the new container's, and `cpus` are those of its VM.
    pub(super) fn request(
        &self,
        disk: Option<DiskAddress>,
        config: config::Restore,
        spec: &Spec,
        cpus: u32,
    ) -> RestoreFrom {
        let options = CriuOptions {
            lazy_pages: config.lazy,
            tcp_close: config.tcp == config::Tcp::Close,
            ..self.manifest.options.criu()
        };
        let mut facts = self.manifest.facts();
        // The VM that the checkpoint was taken in may have had more of them.
        for file in &mut facts.limits {
            if let Some(content) = spec::cpus::file_in_guest(&file.name, &file.content, cpus) {
                file.content = format!("{content}\n");
            }
        }
        RestoreFrom {
            disk: disk.map(guest_disk).into(),
            options: MessageField::some(options),
            facts: MessageField::some(facts),
            hostname: new_hostname(self.manifest.hostname.as_deref(), spec).to_owned(),
            ..Default::default()
        }
    }
}

/// The hostname that the configuration has, if it is another one than that of the checkpoint's; else what the processes
/// have made of it stays.
fn new_hostname<'a>(was: Option<&str>, spec: &'a Spec) -> &'a str {
    let own = spec::has_own(spec, LinuxNamespaceType::Uts);
    match (was, spec.hostname().as_deref()) {
        (Some(was), Some(now)) if own && was != now => now,
        _ => "",
    }
}

/// The disk with the images that are gone on from.
pub(super) async fn restore_disk(
    restore: Option<&Restore>,
    phases: &Phases,
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
        assert_eq!(new_hostname(Some("a"), &own("b")), "b");
        assert_eq!(new_hostname(Some(""), &own("b")), "b");
        // What the processes have made of it stays.
        assert_eq!(new_hostname(Some("a"), &own("a")), "");
        assert_eq!(new_hostname(Some("a"), &own("")), "");
        // A checkpoint of an earlier version does not tell, and the VM's is not the container's.
        assert_eq!(new_hostname(None, &own("b")), "");
        assert_eq!(new_hostname(Some("a"), &spec("b", LinuxNamespaceType::Pid)), "");
    }
}
