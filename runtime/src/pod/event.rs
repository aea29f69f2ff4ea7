//! What happens to containers, for whoever publishes it.

use std::path::PathBuf;

use super::{Create, state::Exit};

/// Something that happened, in the order it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Created {
        pid: u32,
        /// As it was asked for.
        create: Box<Create>,
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
    /// The guest's kernel has ended a process of the container for want of memory.
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
    /// An empty `exec_id` is the container's init.
    Exited {
        id: String,
        exec_id: String,
        pid: u32,
        exit: Exit,
    },
    Deleted {
        id: String,
        pid: u32,
        exit: Exit,
    },
}
