//! Events of containers, for the owner of the pod to publish.

use std::path::PathBuf;

use super::{ContainerId, ExecId, ProcessId, rootfs::RootfsMount, state::ProcessExit, stdio::StdioNames};

/// An event, sent in the order of occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// A container was created.
    Created(Box<CreatedContainer>),
    /// The user's process of a container was started.
    Started {
        /// The container's id.
        id: ContainerId,
        /// The pid of the container's anchor on the host.
        pid: u32,
    },
    /// A container was paused.
    Paused {
        /// The container's id.
        id: ContainerId,
    },
    /// A paused container was resumed.
    Resumed {
        /// The container's id.
        id: ContainerId,
    },
    /// A checkpoint was written to `path`.
    Checkpointed {
        /// The container's id.
        id: ContainerId,
        /// The directory of the checkpoint.
        path: PathBuf,
    },
    /// The guest's kernel has killed a process because the container was out of memory.
    OutOfMemory {
        /// The container's id.
        id: ContainerId,
    },
    /// A process was added to a container.
    ExecAdded {
        /// The container's id.
        id: ContainerId,
        /// The process's id.
        exec: ExecId,
    },
    /// An added process was started.
    ExecStarted {
        /// The container's id.
        id: ContainerId,
        /// The process's id.
        exec: ExecId,
        /// The pid of the container's anchor on the host.
        pid: u32,
    },
    /// A process of a container has ended.
    Exited {
        /// The container's init, or a process that was added to it.
        process: ProcessId,
        /// The pid of the container's anchor on the host.
        pid: u32,
        /// How the process ended.
        exit: ProcessExit,
    },
    /// A container was deleted.
    Deleted {
        /// The container's id.
        id: ContainerId,
        /// The pid of the container's anchor on the host.
        pid: u32,
        /// How the container's init ended.
        exit: ProcessExit,
    },
}

impl PodEvent {
    /// The container that the event is about.
    pub fn container(&self) -> &ContainerId {
        match self {
            Self::Created(created) => &created.id,
            Self::Exited { process, .. } => &process.container,
            Self::Started { id, .. }
            | Self::Paused { id }
            | Self::Resumed { id }
            | Self::Checkpointed { id, .. }
            | Self::OutOfMemory { id }
            | Self::ExecAdded { id, .. }
            | Self::ExecStarted { id, .. }
            | Self::Deleted { id, .. } => id,
        }
    }
}

/// A container that was created, and what its creator asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedContainer {
    /// The container's id.
    pub id: ContainerId,
    /// The pid of the container's anchor on the host.
    pub pid: u32,
    /// Directory with `config.json`.
    pub bundle: PathBuf,
    /// The mounts of the root file system that the caller asked for.
    pub rootfs: Vec<RootfsMount>,
    /// Where the standard streams of the container's init lead.
    pub stdio: StdioNames,
    /// Directory of the checkpoint that the container is restored from.
    pub checkpoint: Option<PathBuf>,
}
