//! What a container waits for: its start, and the memory that a restored one still lacks.

use std::sync::Arc;

use super::ContainerError;
use crate::{
    criu::{CriuError, Fetching, HeldByCriu},
    engine::WaitingInit,
};

/// Where the memory of a container is. A restored container may not have all of it yet.
#[derive(Debug, Clone)]
pub(super) enum MemoryState {
    Complete,
    /// Some of it is still on the disk from which the container was restored.
    Pending,
    /// Some of it is lost, for this reason.
    Lost(Arc<CriuError>),
}

#[derive(Debug)]
pub(super) enum StartStage {
    Created(PendingInit),
    Started,
}

/// An init that has not been started.
#[derive(Debug)]
pub(super) enum PendingInit {
    /// It executes its command when it is started.
    New(WaitingInit),
    /// It continues from a checkpoint when it is started.
    Restored(Box<HeldByCriu>),
}

impl PendingInit {
    /// Has the init run its command, or what was restored. Some of the memory may still have to be fetched.
    pub(super) async fn start(self) -> Result<Option<Fetching>, ContainerError> {
        match self {
            Self::New(waiting) => Ok(waiting.start().await.map(|()| None)?),
            Self::Restored(held) => Ok(held.resume().await?),
        }
    }
}
