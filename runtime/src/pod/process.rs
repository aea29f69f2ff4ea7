//! A process of a container, as the host knows it: its init, or one that was added to it.

use std::sync::{self, MutexGuard};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::{
    state::{Exit, State, StateError, Transition},
    stdio::{Input, Stdin, StdioError, StdioNames},
    streams::PendingInput,
};

#[derive(Debug)]
pub struct Process {
    pub stdio: StdioNames,
    state: watch::Sender<State>,
    /// Held while a transition and its event happen, so that events keep the order of the transitions.
    pub(super) transitions: Mutex<()>,
    stdin: sync::Mutex<ProcessStdin>,
    /// The caller has closed stdin (CloseIO), which it may do at any time, also before the process starts.
    stdin_closed: watch::Sender<bool>,
    /// Set once nothing of the process is left, in the guest and here.
    cleaned: watch::Sender<bool>,
}

/// What is known of a process's stdin.
#[derive(Debug)]
enum ProcessStdin {
    /// It has none, or its streams are not connected yet.
    Absent,
    /// Its streams are connected.
    Pending(PendingInput),
    /// It runs, and is fed.
    Fed(Input),
}

impl Process {
    pub(super) fn new(stdio: StdioNames) -> Self {
        Self {
            stdio,
            state: watch::Sender::new(State::Created),
            transitions: Mutex::new(()),
            stdin: sync::Mutex::new(ProcessStdin::Absent),
            stdin_closed: watch::Sender::new(false),
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

    /// Sets where its stdin will come from when it starts.
    pub(super) fn connect_stdin(&self, input: Option<PendingInput>) {
        if let Some(input) = input {
            *self.stdin() = ProcessStdin::Pending(input);
        }
    }

    /// Opens the caller's end of stdin, right before the process starts; None where there is no stdin.
    ///
    /// # Errors
    /// Those of open(2).
    pub(super) fn open_stdin(&self) -> Result<Option<Stdin>, StdioError> {
        match &*self.stdin() {
            ProcessStdin::Pending(input) => input.open().map(Some),
            ProcessStdin::Absent | ProcessStdin::Fed(_) => Ok(None),
        }
    }

    /// Starts to copy what [`Process::open_stdin`] has opened to the process, which has started.
    pub(super) fn feed(&self, opened: Option<Stdin>) {
        let Some(opened) = opened else { return };
        let mut stdin = self.stdin();
        if let ProcessStdin::Pending(input) = std::mem::replace(&mut *stdin, ProcessStdin::Absent) {
            *stdin = ProcessStdin::Fed(input.start(opened, self.stdin_closed.subscribe()));
        }
    }

    /// How many bytes of stdin were taken from the caller; no more are taken until the guard is dropped. None where there is
    /// no stdin.
    pub(super) async fn hold_stdin(&self) -> Option<OwnedMutexGuard<u64>> {
        let held = match &*self.stdin() {
            ProcessStdin::Fed(input) => input.hold(),
            ProcessStdin::Absent | ProcessStdin::Pending(_) => return None,
        };
        Some(held.await)
    }

    /// Stdin ends when everything that was written to its fifo so far has been read; before the process has started, when
    /// it starts.
    pub(super) fn close_stdin(&self) {
        self.stdin_closed.send_replace(true);
    }

    fn stdin(&self) -> MutexGuard<'_, ProcessStdin> {
        self.stdin.lock().expect("no panic while held")
    }

    /// Nothing of it is left.
    pub(super) fn set_gone(&self) {
        *self.stdin() = ProcessStdin::Absent;
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
