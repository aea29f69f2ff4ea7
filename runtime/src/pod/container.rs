//! One container of a pod, as the host knows it after it was created.

use std::path::PathBuf;

use tokio::sync::{Mutex, watch};

use super::{
    anchor,
    state::{Exit, State, StateError, Transition},
    stdio::{Input, StdioNames},
};
use crate::process::Child;

/// A container that exists in the guest.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub bundle: PathBuf,
    pub stdio: StdioNames,
    /// Pid of the anchor, the host process that stands for the container.
    pub pid: u32,
    anchor: Child,
    state: watch::Sender<State>,
    /// Held while a transition and its event happen, so that events keep the order of the transitions.
    pub(super) transitions: Mutex<()>,
    pub(super) stdin: Option<Input>,
    /// Set once nothing of the container is left in the guest.
    pub(super) cleaned: watch::Sender<bool>,
}

impl Container {
    pub(super) fn new(
        id: String,
        bundle: PathBuf,
        stdio: StdioNames,
        anchor: Child,
        stdin: Option<Input>,
    ) -> Self {
        Self {
            id,
            bundle,
            stdio,
            pid: anchor.pid(),
            anchor,
            state: watch::Sender::new(State::Created),
            transitions: Mutex::new(()),
            stdin,
            cleaned: watch::Sender::new(false),
        }
    }

    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Resolves when the container's init has ended and its output was delivered.
    pub async fn exited(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            state.changed().await.expect("the sender lives in self");
        }
    }

    /// Resolves when nothing of the container is left in the guest.
    pub(super) async fn gone_from_guest(&self) {
        self.cleaned.subscribe().wait_for(|&cleaned| cleaned).await.expect("the sender lives in self");
    }

    /// Moves to the state after `transition`; the caller holds `transitions`.
    pub(super) fn advance(&self, transition: Transition) -> Result<(), StateError> {
        if let Some(next) = self.state().after(transition)? {
            self.state.send_replace(next);
        }
        Ok(())
    }

    /// Ends the anchor, as the container has ended.
    pub(super) async fn end_anchor(&self) {
        if let Err(error) = self.anchor.kill().await {
            tracing::warn!(id = self.id, "cannot end the {}: {error}", anchor::ARGUMENT);
        }
    }
}
