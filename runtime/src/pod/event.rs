//! What happens to containers, for whoever publishes it.

use super::state::Exit;

/// Something that happened, in the order it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Created { id: String, pid: u32 },
    Started { id: String, pid: u32 },
    OutOfMemory { id: String },
    Exited { id: String, pid: u32, exit: Exit },
    Deleted { id: String, pid: u32, exit: Exit },
}
