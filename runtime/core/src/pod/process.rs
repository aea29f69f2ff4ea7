//! The host's record of a container's process: its init, or a process that was added to it.

use std::sync::{self, MutexGuard};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};

use super::{
    state::{ProcessExit, ProcessState, StateError, Transition},
    stdio::{StdinCopy, StdinReader, StdioError, StdioNames},
    streams::PendingInput,
};

/// A process of a container: the init or one that was added.
#[derive(Debug)]
pub struct ContainerProcess {
    /// Where the process's standard streams lead.
    pub stdio: StdioNames,
    state: watch::Sender<ProcessState>,
    /// Held while a transition and its event happen, so that events keep the order of the transitions.
    pub(super) transitions: Mutex<()>,
    stdin: sync::Mutex<ProcessStdin>,
    /// The caller has closed stdin (CloseIO). This may happen at any time, also before the process starts.
    stdin_closed: watch::Sender<bool>,
    /// Set when nothing of the process is left in the guest or on the host.
    cleaned: watch::Sender<bool>,
}

/// The state of a process's stdin.
#[derive(Debug)]
enum ProcessStdin {
    /// There is no stdin, or its streams are not connected yet.
    Absent,
    /// The streams are connected.
    Pending(PendingInput),
    /// The process runs, and its stdin is being copied.
    Fed(StdinCopy),
}

impl ContainerProcess {
    pub(super) fn new(stdio: StdioNames) -> Self {
        Self {
            stdio,
            state: watch::Sender::new(ProcessState::Created),
            transitions: Mutex::new(()),
            stdin: sync::Mutex::new(ProcessStdin::Absent),
            stdin_closed: watch::Sender::new(false),
            cleaned: watch::Sender::new(false),
        }
    }

    /// The present state.
    pub fn state(&self) -> ProcessState {
        *self.state.borrow()
    }

    /// Resolves when the process has ended and its output has been delivered.
    pub async fn exited(&self) -> ProcessExit {
        let mut state = self.state.subscribe();
        loop {
            if let ProcessState::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            state.changed().await.expect("the sender lives in self");
        }
    }

    /// Resolves as soon as the process is not paused.
    pub(super) async fn not_paused(&self) {
        let mut state = self.state.subscribe();
        state.wait_for(|state| *state != ProcessState::Paused).await.expect("the sender lives in self");
    }

    /// Moves to the state after `transition`; the caller holds `transitions`.
    pub(super) fn advance(&self, transition: Transition) -> Result<(), StateError> {
        if let Some(next) = self.state().after(transition)? {
            self.state.send_replace(next);
        }
        Ok(())
    }

    /// Sets where stdin will come from when the process starts.
    pub(super) fn connect_stdin(&self, input: Option<PendingInput>) {
        if let Some(input) = input {
            *self.stdin() = ProcessStdin::Pending(input);
        }
    }

    /// Opens the caller's end of stdin, right before the process starts. Returns None if there is no stdin.
    ///
    /// # Errors
    /// The errors of open(2).
    pub(super) fn open_stdin(&self) -> Result<Option<StdinReader>, StdioError> {
        match &*self.stdin() {
            ProcessStdin::Pending(input) => input.open().map(Some),
            ProcessStdin::Absent | ProcessStdin::Fed(_) => Ok(None),
        }
    }

    /// Starts to copy input that [`ContainerProcess::open_stdin`] has opened to the process, which has
    /// started.
    pub(super) fn feed(&self, opened: Option<StdinReader>) {
        let Some(opened) = opened else { return };
        let mut stdin = self.stdin();
        if let ProcessStdin::Pending(input) = std::mem::replace(&mut *stdin, ProcessStdin::Absent) {
            *stdin = ProcessStdin::Fed(input.start(opened, self.stdin_closed.subscribe()));
        }
    }

    /// Returns how many bytes of stdin were taken from the caller. No more are taken until the guard is
    /// dropped. Returns None if there is no stdin.
    pub(super) async fn hold_stdin(&self) -> Option<OwnedMutexGuard<u64>> {
        let held = match &*self.stdin() {
            ProcessStdin::Fed(input) => input.hold(),
            ProcessStdin::Absent | ProcessStdin::Pending(_) => return None,
        };
        Some(held.await)
    }

    /// Ends stdin after the data that is in its fifo now. If the process has not started, the request takes
    /// effect when it starts.
    pub(super) fn close_stdin(&self) {
        self.stdin_closed.send_replace(true);
    }

    fn stdin(&self) -> MutexGuard<'_, ProcessStdin> {
        self.stdin.lock().expect("no panic while held")
    }

    /// Records that nothing of the process is left.
    pub(super) fn set_gone(&self) {
        *self.stdin() = ProcessStdin::Absent;
        self.cleaned.send_replace(true);
    }

    /// Resolves when nothing of the process is left.
    pub(super) async fn gone(&self) {
        self.cleaned.subscribe().wait_for(|&cleaned| cleaned).await.expect("the sender lives in self");
    }
}
