//! Events of containers, for the owner of the pod to publish.

use std::path::PathBuf;

use super::{CreateRequest, state::ProcessExit};

/// An event, sent in the order of occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodEvent {
    Created {
        pid: u32,
        /// The request, unchanged.
        create: Box<CreateRequest>,
    },
    Started {
        id: String,
        pid: u32,
    },
    Paused {
        id: String,
    },
    Resumed {
        id: String,
    },
    /// A checkpoint was written to `path`.
    Checkpointed {
        id: String,
        path: PathBuf,
    },
    /// The guest's kernel has killed a process because the container was out of memory.
    OutOfMemory {
        id: String,
    },
    ExecAdded {
        id: String,
        exec_id: String,
    },
    ExecStarted {
        id: String,
        exec_id: String,
        pid: u32,
    },
    /// `exec_id` is empty for the container's init.
    Exited {
        id: String,
        exec_id: String,
        pid: u32,
        exit: ProcessExit,
    },
    Deleted {
        id: String,
        pid: u32,
        exit: ProcessExit,
    },
}
