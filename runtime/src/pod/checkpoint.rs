//! A container's checkpoint: taken while it stands still, and gone on from by another.
//!
//! ```text
//!   checkpoint   freeze, export the layer (unless paused) -> a disk for the guest -> CRIU dumps onto it
//!                -> read, hashed, synced to the directory -> exit: killed | else: as it was before
//!   create       manifest understood -> images checked and put on a disk -> CRIU makes the processes, which wait
//!   start        they run
//! ```
//! Until the files are on the medium nothing has happened to the container: a failure leaves it as it was.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use machinen_protocol::api::{
    CheckpointContainerRequest, CheckpointContainerResponse, CriuOptions, Disk, RestoreFrom,
};
use protobuf::MessageField;
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::{
    Container, Event, Pod, PodError,
    phases::Phases,
    state::{State, StateError},
};
use crate::{
    agent::{self, AgentError},
    checkpoint::{self, CheckpointError, FORMAT, Images, Manifest, Options, Saved},
    config::{self, Config},
    error::chain,
    rootdisk::{Key, RootdiskCache},
    vm::{DiskAddress, DiskSpec, Vm, VmError},
};

/// What images can take beside the container's memory, bytes.
const BESIDE_MEMORY: u64 = 256 << 20;

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
        let refused = |source| Err(PodError::state("checkpoint", id, source));
        let was_paused = match container.state() {
            State::Running => false,
            State::Paused => true,
            State::Created => return refused(StateError::NotStarted),
            State::Stopped(_) => return refused(StateError::AlreadyStopped),
        };
        let agent = self.agent(id).await?;
        if !was_paused {
            agent.pause_container(id).await.map_err(|source| PodError::guest("pause", id, source))?;
        }
        let written = async {
            if !was_paused {
                self.while_frozen(container).await?;
            }
            self.write_checkpoint(container, &agent, wanted).await
        };
        let mut done = written.await;
        if done.is_ok() {
            self.emit(Event::Checkpointed { id: id.to_owned(), path: wanted.path.clone() });
            if wanted.exit {
                let killed = agent.signal_process(id, "", libc::SIGKILL.cast_unsigned(), true).await;
                done = killed.map_err(|source| PodError::guest("end", id, source));
            }
        }
        let goes_on = done.is_err() || !wanted.exit;
        if goes_on
            && !was_paused
            && let Err(error) = agent.resume_container(id).await
        {
            tracing::error!(id, "cannot resume after a checkpoint: {}", chain(&error));
        }
        done
    }

    async fn write_checkpoint(
        &self,
        container: &Container,
        agent: &agent::Client,
        wanted: &Checkpoint,
    ) -> Result<(), PodError> {
        let id = container.id.as_str();
        let failed = |source| PodError::Checkpoint { id: id.to_owned(), source };
        let manifest = manifest(container, wanted.options).map_err(failed)?;
        let (scratch, size) = self.scratch_disk().await?;
        let phases = Phases::default();
        let vm = self.vm_of(id).await?;
        let dumped = phases.time("dump", dump(&vm, agent, id, &scratch, wanted.options)).await;
        // The guest only sees that a write has failed.
        let dumped = dumped.map_err(|error| match is_full(&scratch) {
            true => failed(CheckpointError::NoSpace {
                path: self.shared.config.rootdisk.dir.clone(),
                source: io::ErrorKind::StorageFull.into(),
            }),
            false => error,
        })?;
        let criu = Duration::from_micros(dumped.criu_us);
        let images =
            Images { disk: scratch, size, files: dumped.files, facts: dumped.facts.unwrap_or_default() };
        let Checkpoint { path, also, work, .. } = wanted.clone();
        let save = move || -> Result<Saved, CheckpointError> {
            let saved = checkpoint::save(images, manifest, &path)?;
            let also = also.filter(|also| *also != path);
            let copied = also.as_ref().map_or(Ok(()), |also| checkpoint::copy(&path, also));
            let also = also.filter(|_| copied.is_ok());
            let copied =
                copied.and_then(|()| work.map_or(Ok(()), |work| checkpoint::copy_reports(&path, &work)));
            if copied.is_err() {
                for dir in also.iter().chain([&path]) {
                    if let Err(error) = checkpoint::remove(dir) {
                        tracing::warn!("{}", chain(&error));
                    }
                }
            }
            copied.map(|()| saved)
        };
        let saved = phases.time("save", async { spawn_blocking(save).await.map_err(PodError::Worker) });
        let Saved { files, bytes } = saved.await?.map_err(failed)?;
        tracing::info!(id, files, bytes, ?criu, phases = %phases, path = %wanted.path.display(), "container checkpointed");
        Ok(())
    }

    /// As large as the images can be. Nobody can open it, and it goes with its descriptor.
    async fn scratch_disk(&self) -> Result<(File, u64), PodError> {
        let size = (u64::from(self.vm_memory_mib()) << 20) * 5 / 4 + BESIDE_MEMORY;
        let config::Rootdisk { dir, mke2fs, .. } = self.shared.config.rootdisk.clone();
        let make = move || RootdiskCache::open(&dir)?.unnamed_writable(size, &mke2fs);
        let file = spawn_blocking(make).await.map_err(PodError::Worker)??;
        Ok((file, size))
    }
}

/// Has CRIU dump onto the disk, which the VM does not have any more when this returns.
async fn dump(
    vm: &Vm,
    agent: &agent::Client,
    id: &str,
    scratch: &File,
    options: Options,
) -> Result<CheckpointContainerResponse, PodError> {
    let file = scratch.try_clone().map_err(PodError::Descriptor)?.into();
    let disk = DiskSpec { file, read_only: false, serial: "checkpoint".to_owned() };
    let vm_error = |what| move |source| PodError::Vm { what, source };
    let address = vm.attach_disk(disk).await.map_err(vm_error("attach a disk for the checkpoint"))?;
    let request = CheckpointContainerRequest {
        container_id: id.to_owned(),
        disk: MessageField::some(guest_disk(address)),
        options: MessageField::some(options.criu()),
        ..Default::default()
    };
    let dumped = agent.checkpoint_container(request).await;
    let detached = vm.detach_disk(address).await;
    let dumped = dumped.map_err(|source| PodError::guest("checkpoint", id, source))?;
    detached.map_err(vm_error("detach the checkpoint's disk"))?;
    Ok(dumped)
}

/// The file system of the host that the file is on has no room.
fn is_full(file: &File) -> bool {
    rustix::fs::fstatvfs(file).is_ok_and(|space| space.f_bavail * space.f_frsize < 1 << 20)
}

fn guest_disk(address: DiskAddress) -> Disk {
    Disk { target: address.target, lun: address.lun, ..Default::default() }
}

fn manifest(container: &Container, options: Options) -> Result<Manifest, CheckpointError> {
    let path = container.bundle.join("config.json");
    let config = fs::read(&path).map_err(|source| CheckpointError::File {
        action: "read",
        path: path.clone(),
        source,
    })?;
    Ok(Manifest {
        format: FORMAT,
        machinen: env!("CARGO_PKG_VERSION").to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        container: container.id.clone(),
        rootdisk: container.base.map(|key| key.to_string()),
        config: format!("sha256:{:x}", Sha256::digest(&config)),
        terminal: container.init.stdio.terminal,
        options,
        ..Manifest::default()
    })
}

impl Container {
    /// Takes the disk with the checkpoint out of the VM of a container that runs, when it has all of its memory.
    pub(super) fn release_checkpoint(self: &Arc<Self>, agent: agent::Client) {
        let disk = self.checkpoint_disk.lock().expect("no panic while held").take();
        let Some(address) = disk else { return };
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let id = container.id.as_str();
            match agent.wait_pages(id).await {
                Ok(()) => tracing::info!(id, "all of the container's memory was fetched from its checkpoint"),
                Err(AgentError::Closed) => return,
                Err(error) => tracing::error!(id, "a restored container has lost memory: {}", chain(&error)),
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

    fn failed(&self, source: CheckpointError) -> PodError {
        PodError::Restore { id: self.id.clone(), dir: self.dir.clone(), source }
    }

    /// Its processes have files of that disk open.
    pub(super) fn check_rootfs(&self, base: Option<Key>) -> Result<(), PodError> {
        match (&self.manifest.rootdisk, base) {
            (Some(theirs), Some(ours)) if *theirs != ours.to_string() => {
                Err(self.failed(CheckpointError::Rootfs { theirs: theirs.clone(), ours }))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn request(&self, disk: Option<DiskAddress>, lazy: bool) -> RestoreFrom {
        RestoreFrom {
            disk: disk.map(guest_disk).into(),
            options: MessageField::some(CriuOptions { lazy_pages: lazy, ..self.manifest.options.criu() }),
            facts: MessageField::some(self.manifest.facts()),
            ..Default::default()
        }
    }
}

/// The disk with the images that are gone on from.
pub(super) async fn restore_disk(
    restore: Option<&Restore>,
    config: &Config,
    phases: &Phases,
) -> Result<Option<File>, PodError> {
    let Some(restore) = restore.cloned() else { return Ok(None) };
    let config::Rootdisk { dir, mke2fs, .. } = config.rootdisk.clone();
    let make = move || {
        let cache = RootdiskCache::open(&dir).map_err(CheckpointError::from);
        let disk =
            cache.and_then(|cache| checkpoint::image_disk(&restore.dir, &restore.manifest, &cache, &mke2fs));
        disk.map_err(|source| restore.failed(source))
    };
    let made = phases.time("checkpoint", async { spawn_blocking(make).await.map_err(PodError::Worker)? });
    made.await.map(Some)
}
