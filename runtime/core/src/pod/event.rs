//! Events of containers, for the owner of the pod to publish.

use std::path::PathBuf;

use super::{CreateRequest, state::ProcessExit};

/// An event, sent in the order of occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    /// A container was created.
    Created {
        /// The pid of the container's anchor on the host.
        pid: u32,
        /// The request, unchanged.
        create: Box<CreateRequest>,
    },
    /// The user's process of a container was started.
    Started {
        /// The container's id.
        id: String,
        /// The pid of the container's anchor on the host.
        pid: u32,
    },
    /// A container was paused.
    Paused {
        /// The container's id.
        id: String,
    },
    /// A paused container was resumed.
    Resumed {
        /// The container's id.
        id: String,
    },
    /// A checkpoint was written to `path`.
    Checkpointed {
        /// The container's id.
        id: String,
        /// The directory of the checkpoint.
        path: PathBuf,
    },
    /// The guest's kernel has killed a process because the container was out of memory.
    OutOfMemory {
        /// The container's id.
        id: String,
    },
    /// A process was added to a container.
    ExecAdded {
        /// The container's id.
        id: String,
        /// The process's id.
        exec_id: String,
    },
    /// An added process was started.
    ExecStarted {
        /// The container's id.
        id: String,
        /// The process's id.
        exec_id: String,
        /// The pid of the container's anchor on the host.
        pid: u32,
    },
    /// A process of a container has ended.
    Exited {
        /// The container's id.
        id: String,
        /// The process's id; empty for the container's init.
        exec_id: String,
        /// The pid of the container's anchor on the host.
        pid: u32,
        /// How the process ended.
        exit: ProcessExit,
    },
    /// A container was deleted.
    Deleted {
        /// The container's id.
        id: String,
        /// The pid of the container's anchor on the host.
        pid: u32,
        /// How the container's init ended.
        exit: ProcessExit,
    },
}
