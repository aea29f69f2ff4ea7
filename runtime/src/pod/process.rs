//! A process of a container, as the host knows it: its init, or one that was added to it.

use std::sync::OnceLock;

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::{
    state::{Exit, State, StateError, Transition},
    stdio::{Input, StdioNames},
};

#[derive(Debug)]
pub struct Process {
    pub stdio: StdioNames,
    state: watch::Sender<State>,
    /// Held while a transition and its event happen, so that events keep the order of the transitions.
    pub(super) transitions: Mutex<()>,
    stdin: OnceLock<Input>,
    /// Set once nothing of the process is left, in the guest and here.
    cleaned: watch::Sender<bool>,
}

impl Process {
    pub(super) fn new(stdio: StdioNames) -> Self {
        Self {
            stdio,
            state: watch::Sender::new(State::Created),
            transitions: Mutex::new(()),
            stdin: OnceLock::new(),
            cleaned: watch::Sender::new(false),
        }
    }

    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Resolves when the process has ended and its output was delivered.
    pub async fn exited(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            state.changed().await.expect("the sender lives in self");
        }
    }

    /// Moves to the state after `transition`; the caller holds `transitions`.
    pub(super) fn advance(&self, transition: Transition) -> Result<(), StateError> {
        if let Some(next) = self.state().after(transition)? {
            self.state.send_replace(next);
        }
        Ok(())
    }

    /// The caller's stdin is on its way.
    pub(super) fn feed(&self, stdin: Option<Input>) {
        if let Some(stdin) = stdin {
            // A process starts once.
            let _ = self.stdin.set(stdin);
        }
    }

    /// How many bytes of stdin were taken from the caller; no more are until this is dropped. None where there is no stdin.
    pub(super) async fn hold_stdin(&self) -> Option<OwnedMutexGuard<u64>> {
        match self.stdin.get() {
            Some(stdin) => Some(stdin.hold().await),
            None => None,
        }
    }

    /// Stdin ends when everything that was written to its fifo so far has been read.
    pub(super) fn close_stdin(&self) {
        if let Some(stdin) = self.stdin.get() {
            stdin.close();
        }
    }

    /// Nothing of it is left.
    pub(super) fn set_gone(&self) {
        self.cleaned.send_replace(true);
    }

    pub(super) fn is_gone(&self) -> bool {
        *self.cleaned.borrow()
    }

    /// Resolves when nothing of it is left.
    pub(super) async fn gone(&self) {
        self.cleaned.subscribe().wait_for(|&cleaned| cleaned).await.expect("the sender lives in self");
    }
}
