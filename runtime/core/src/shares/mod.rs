//! The volumes of a pod: files and directories of the host that its containers see.
//!
//! ```text
//!   guest's agent ──raw streams──> this process ──sockets──> share server (jailed) ──> volumes
//!                                       └── mounts the volumes in the server's mount namespace
//! ```
//! A pod has one share server, which starts with its first volume and ends with its VM. The server parses what
//! the guest sends, so it is jailed ([`jail`](self::jail)): it sees nothing of the host but the volumes, which
//! this process mounts for it. A server that an attacker has taken over reaches no more than the guest may reach.

mod dial;
mod extended;
mod init;
mod jail;
mod kept;
mod listing;
mod mapping;
mod queue;
mod reopen;
mod replaced;
mod root;
mod server;
mod sockets;
mod start;

use std::{
    io, mem,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use machinen_base::{
    error::{ErrorKind, HasKind, chain},
    mounts::{TreeOptions, clone_tree, map_users},
    process::ProcessError,
};
use machinen_protocol::shares::ShareEntry;
use machinen_vm::{
    Vm, VmError,
    agent::{self, AgentError},
};
use tokio::{
    sync::{Mutex, Semaphore},
    task::{JoinHandle, spawn_blocking},
};

use replaced::Follower;
use root::ShareRoot;
use start::ShareServer;

use crate::spec::volumes::IdMappings;

pub use mapping::MAPPING_ENTRY_POINT;
pub use server::ENTRY_POINT;
#[cfg(fuzzing)]
pub use server::ServedFiles;

/// Why a volume cannot be provided.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The source of a volume cannot be opened.
    #[error("cannot open {}, the source of the mount {}", path.display(), destination.display())]
    Source {
        /// The path on the host.
        path: PathBuf,
        /// The path in the container.
        destination: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The source of a volume is neither a directory nor a regular file or a socket.
    #[error(
        "{}, the source of the mount {}, is a {kind}: only directories, regular files and sockets can be mounted",
        path.display(), destination.display()
    )]
    SourceKind {
        /// The path on the host.
        path: PathBuf,
        /// The path in the container.
        destination: PathBuf,
        /// The type of the file.
        kind: &'static str,
    },
    /// A mount of the host cannot be made or shown to the server.
    #[error("cannot mount {} for the server of the pod's volumes", path.display())]
    Mount {
        /// The path on the host.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Changes of a volume cannot be followed.
    #[error("cannot watch {} for changes", path.display())]
    Watch {
        /// The path on the host.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The process for a mapping of users cannot be started or ended.
    #[error("cannot make a user namespace for an ID-mapped mount")]
    Mapper(#[source] ProcessError),
    /// The kernel refuses a mapping of users.
    #[error("the kernel refuses the mapping of users of an ID-mapped mount")]
    Mappings(#[source] io::Error),
    /// The users of a volume cannot be mapped.
    #[error("cannot map the users of {}: its file system must support ID-mapped mounts", path.display())]
    Mapped {
        /// The path on the host.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The server's root directory or sockets cannot be made.
    #[error("cannot {action} for the server of the pod's volumes")]
    Prepare {
        /// What failed: a verb that fits the text.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The server cannot be started.
    #[error("cannot start the server of the pod's volumes")]
    Spawn(#[source] ProcessError),
    /// The server has ended while the VM runs, so the pod's volumes are lost.
    #[error("the server of the pod's volumes has ended: the pod must be created anew")]
    Ended,
    /// No stream to the guest can be opened.
    #[error("cannot connect the pod's volumes to the guest")]
    Stream(#[source] VmError),
    /// The guest cannot mount the volumes.
    #[error("cannot mount the pod's volumes in the guest")]
    Guest(#[source] AgentError),
}

impl HasKind for ShareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Source { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::SourceKind { .. } => ErrorKind::Unimplemented,
            Self::Mapped { .. } => ErrorKind::FailedPrecondition,
            Self::Mappings(_) => ErrorKind::InvalidArgument,
            Self::Ended => ErrorKind::FailedPrecondition,
            Self::Stream(source) => source.kind(),
            Self::Guest(source) => source.kind(),
            Self::Source { .. }
            | Self::Mount { .. }
            | Self::Watch { .. }
            | Self::Prepare { .. }
            | Self::Spawn(_)
            | Self::Mapper(_) => ErrorKind::Internal,
        }
    }
}

/// A volume whose source is open.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    /// The path on the host, for messages.
    pub(crate) path: PathBuf,
    /// The path in the container's configuration.
    pub(crate) destination: PathBuf,
    /// The file or directory, which is not replaced by another one under the same path.
    pub(crate) source: Arc<OwnedFd>,
    pub(crate) is_file: bool,
    pub(crate) options: TreeOptions,
    /// The users in the guest to whom the files of users on the host belong.
    pub(crate) mappings: Option<IdMappings>,
}

/// A volume that is visible in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedVolume {
    /// The name of the volume in the guest.
    pub(crate) entry: ShareEntry,
    /// The path in the container's configuration.
    pub(crate) destination: PathBuf,
    pub(crate) read_only: bool,
}

/// The VM that a volume is mounted in.
#[derive(Debug)]
pub(crate) struct ShareGuest<'a> {
    pub(crate) vm: &'a Vm,
    pub(crate) agent: &'a agent::Client,
    /// Acquired while streams are open that the agent has not claimed.
    pub(crate) unclaimed: &'a Arc<Semaphore>,
}

/// The share server of a pod. There is none before the first volume.
#[derive(Debug, Default)]
pub(crate) struct PodShares {
    state: Mutex<ShareState>,
}

#[derive(Debug, Default)]
enum ShareState {
    #[default]
    None,
    /// The guest has not mounted anything yet.
    Started(ShareServer),
    Running(RunningShares),
}

impl ShareState {
    fn run(&mut self, running: RunningShares) -> &mut RunningShares {
        *self = Self::Running(running);
        match self {
            Self::Running(running) => running,
            Self::None | Self::Started(_) => unreachable!("it has just been set"),
        }
    }
}

#[derive(Debug)]
struct RunningShares {
    vm: Vm,
    root: Arc<ShareRoot>,
    /// Ends with the VM or the server.
    serving: JoinHandle<()>,
    next_number: u32,
}

/// The volumes of one container in the server. They stay until [`ContainerShares::remove`] or the end of the VM.
#[derive(Debug, Default)]
pub(crate) struct ContainerShares {
    root: Option<Arc<ShareRoot>>,
    /// In the order of the configuration.
    volumes: Vec<SharedVolume>,
    /// Those of the volumes whose files the host replaces all at once.
    followers: Vec<Follower>,
}

impl PodShares {
    /// Starts the server, unless there is one, if there are volumes to be added: it takes no guest, so that it may start
    /// while the VM does. [`PodShares::settle`] ends it if nothing is added.
    ///
    /// # Errors
    /// The server cannot be started.
    pub(crate) async fn prepare(&self, volumes: &[Volume]) -> Result<(), ShareError> {
        let mut state = self.state.lock().await;
        if !volumes.is_empty() && matches!(*state, ShareState::None) {
            *state = ShareState::Started(ShareServer::start().await?);
        }
        Ok(())
    }

    /// Makes volumes visible in the guest, and starts the server with the first one.
    ///
    /// # Errors
    /// A volume cannot be mounted, or the server cannot be started. None of the volumes is visible then.
    pub(crate) async fn add(
        &self,
        guest: &ShareGuest<'_>,
        volumes: &[Volume],
    ) -> Result<ContainerShares, ShareError> {
        if volumes.is_empty() {
            return Ok(ContainerShares::default());
        }
        let mut state = self.state.lock().await;
        let running = match mem::take(&mut *state) {
            ShareState::Running(running) if running.vm.pid() == guest.vm.pid() => running,
            ShareState::Running(RunningShares { serving, .. }) => {
                // Its VM has ended. The error that the task has panicked is reported by the runtime.
                drop(serving.await);
                ShareServer::start().await?.connect(guest).await?
            }
            ShareState::Started(server) => server.connect(guest).await?,
            ShareState::None => ShareServer::start().await?.connect(guest).await?,
        };
        let running = state.run(running);
        if running.serving.is_finished() {
            return Err(ShareError::Ended);
        }
        running.mount(volumes, guest.agent).await
    }

    /// Ends a server that no guest has been connected with, and waits until another one is gone, if its VM has ended.
    pub(crate) async fn settle(&self) {
        let mut state = self.state.lock().await;
        let running = match &mut *state {
            ShareState::None => return,
            ShareState::Running(running) => running,
            ShareState::Started(_) => {
                if let ShareState::Started(server) = mem::take(&mut *state) {
                    server.end().await;
                }
                return;
            }
        };
        tokio::select! {
            biased;
            _ = running.vm.exited() => {}
            () = std::future::ready(()) => return,
        }
        // The error that the task has panicked is reported by the runtime.
        drop((&mut running.serving).await);
        *state = ShareState::None;
    }
}

impl RunningShares {
    async fn mount(
        &mut self,
        volumes: &[Volume],
        agent: &agent::Client,
    ) -> Result<ContainerShares, ShareError> {
        let mut shares = ContainerShares { root: Some(Arc::clone(&self.root)), ..ContainerShares::default() };
        for volume in volumes {
            let entry = ShareEntry { number: self.next_number, is_file: volume.is_file };
            self.next_number = self.next_number.wrapping_add(1);
            if let Err(error) = mount(Arc::clone(&self.root), entry, volume).await {
                shares.remove().await;
                return Err(error);
            }
            shares.volumes.push(SharedVolume {
                entry,
                destination: volume.destination.clone(),
                read_only: volume.options.read_only,
            });
            match Follower::start(volume, entry, agent).await {
                Ok(follower) => shares.followers.extend(follower),
                Err(source) => {
                    shares.remove().await;
                    return Err(ShareError::Watch { path: volume.path.clone(), source });
                }
            }
        }
        Ok(shares)
    }
}

/// Mounts one volume for the server.
async fn mount(root: Arc<ShareRoot>, entry: ShareEntry, volume: &Volume) -> Result<(), ShareError> {
    let mapping = match &volume.mappings {
        Some(mappings) => Some((mapping::namespace(mappings).await?, mappings.recursive)),
        None => None,
    };
    let volume = volume.clone();
    let mount = move || {
        let path = volume.path;
        let failed = |source| ShareError::Mount { path: path.clone(), source };
        let tree = clone_tree(volume.source.as_fd(), volume.options).map_err(failed)?;
        if let Some((namespace, recursive)) = mapping {
            map_users(tree.as_fd(), namespace.as_fd(), recursive)
                .map_err(|source| ShareError::Mapped { path: path.clone(), source })?;
        }
        root.add(entry, &tree).map_err(failed)
    };
    let mounted = spawn_blocking(mount).await;
    mounted.unwrap_or_else(|error| Err(prepare("mount a volume")(io::Error::other(error))))
}

fn prepare(action: &'static str) -> impl FnOnce(io::Error) -> ShareError {
    move |source| ShareError::Prepare { action, source }
}

impl ContainerShares {
    /// The volumes, in the order in which they were given.
    pub(crate) fn volumes(&self) -> &[SharedVolume] {
        &self.volumes
    }

    /// The names of the volumes in the guest.
    pub(crate) fn entries(&self) -> impl Iterator<Item = ShareEntry> {
        self.volumes.iter().map(|volume| volume.entry)
    }

    /// Removes the volumes from the server, because the container is gone from the guest.
    pub(crate) async fn remove(&self) {
        let Some(root) = self.root.clone() else { return };
        for follower in &self.followers {
            follower.stop().await;
        }
        let entries: Vec<_> = self.entries().collect();
        let removed =
            spawn_blocking(move || entries.into_iter().try_for_each(|entry| root.remove(entry))).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("cannot remove a volume from its server: {}", chain(&error)),
            Err(error) => tracing::warn!("cannot remove a volume from its server: {error}"),
        }
    }
}
