//! The states of a container and of every process in it, as one pure function.
//!
//! ```text
//!                      Paused --------exited----------v
//!                  pause| ^resume                     Stopped --delete--> (gone)
//!   Created --start--> Running --------exited----------^  ^
//!      \------------------exited--------------------------/
//! ```

use std::time::SystemTime;

/// The exit status of a process that SIGKILL has ended. containerd's clients expect it also of a container whose
/// VM or shim was lost.
pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// 0..=255; 128+n when signal n ended the process.
    pub status: u32,
    /// When the host learned of the end.
    pub at: SystemTime,
}

/// The state of a process. Each variant holds exactly what exists in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// The init waits in the guest; none of the user's code has run.
    Created,
    /// The user's process runs.
    Running,
    /// Every process of the container is frozen; signals other than SIGKILL are delivered when it is resumed.
    Paused,
    /// The process has ended.
    Stopped(ProcessExit),
}

/// An event that changes the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// The user's process was started.
    Start,
    /// The container was frozen.
    Pause,
    /// The container was thawed.
    Resume,
    /// The process ended by itself, by a signal, or with its VM.
    Exited(ProcessExit),
    /// The container or process was deleted.
    Delete,
}

impl Transition {
    /// The request that causes the transition, if it is not caused by the process itself.
    fn request(self) -> Option<PodRequest> {
        match self {
            Self::Start => Some(PodRequest::Start),
            Self::Pause => Some(PodRequest::Pause),
            Self::Resume => Some(PodRequest::Resume),
            Self::Delete => Some(PodRequest::Delete),
            Self::Exited(_) => None,
        }
    }
}

/// A request that the state of a process may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodRequest {
    /// Start the user's process.
    Start,
    /// Freeze the container.
    Pause,
    /// Thaw the container.
    Resume,
    /// Delete the container or process.
    Delete,
    /// Adding a process, which could not run in a paused container either.
    Exec,
    /// Take a checkpoint.
    Checkpoint,
    /// Changing the limits.
    Update,
    /// Send a signal.
    Signal,
    /// Setting the size of the terminal.
    Resize,
    /// Writing secrets, for which files of a paused container would have to change.
    Secrets,
}

impl PodRequest {
    /// The request in an error: "cannot VERB container c1".
    pub fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
            Self::Exec => "exec in",
            Self::Checkpoint => "checkpoint",
            Self::Update => "update",
            Self::Signal => "signal",
            Self::Resize => "resize the terminal of",
            Self::Secrets => "set secrets of",
        }
    }
}

/// Why a request is not possible in the current state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The process was started before.
    #[error("already started")]
    AlreadyStarted,
    /// The process has stopped.
    #[error("has already stopped")]
    AlreadyStopped,
    /// A signal came too late. containerd then waits for the exit, and takes no other error for that.
    #[error("has already stopped")]
    Finished,
    /// The process still runs.
    #[error("is still running")]
    StillRunning,
    /// The process was not started yet.
    #[error("has not been started")]
    NotStarted,
    /// The process has no terminal.
    #[error("has no terminal")]
    NoTerminal,
    /// The container is paused.
    #[error("is paused")]
    Paused,
    /// The container is not paused.
    #[error("is not paused")]
    NotPaused,
}

impl ProcessState {
    /// Whether a request is possible in this state: the one table for all verbs.
    ///
    /// # Errors
    /// Why the request is refused.
    pub fn allows(self, request: PodRequest) -> Result<(), StateError> {
        use PodRequest::{Checkpoint, Delete, Exec, Pause, Resize, Resume, Secrets, Signal, Start, Update};
        match (self, request) {
            (Self::Created, Start | Exec | Update | Signal | Resize | Secrets)
            | (Self::Running, Pause | Exec | Checkpoint | Update | Signal | Resize | Secrets)
            | (Self::Paused, Resume | Checkpoint | Update | Signal | Resize)
            | (Self::Stopped(_), Delete) => Ok(()),
            (Self::Stopped(_), Signal) => Err(StateError::Finished),
            (Self::Stopped(_), _) => Err(StateError::AlreadyStopped),
            (Self::Running | Self::Paused, Start) => Err(StateError::AlreadyStarted),
            (Self::Created, Pause | Resume | Checkpoint) => Err(StateError::NotStarted),
            (Self::Paused, Pause | Delete | Exec | Secrets) => Err(StateError::Paused),
            (Self::Running, Resume) => Err(StateError::NotPaused),
            (Self::Created | Self::Running, Delete) => Err(StateError::StillRunning),
        }
    }

    /// Returns the state after `transition`, or `None` when the container is removed.
    ///
    /// # Errors
    /// Why the transition is not possible in this state.
    pub fn after(self, transition: Transition) -> Result<Option<Self>, StateError> {
        if let Some(request) = transition.request() {
            self.allows(request)?;
        }
        match (self, transition) {
            (_, Transition::Start | Transition::Resume) => Ok(Some(Self::Running)),
            (_, Transition::Pause) => Ok(Some(Self::Paused)),
            (_, Transition::Delete) => Ok(None),
            (Self::Stopped(_), Transition::Exited(_)) => Err(StateError::AlreadyStopped),
            (_, Transition::Exited(exit)) => Ok(Some(Self::Stopped(exit))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit(status: u32) -> ProcessExit {
        ProcessExit { status, at: SystemTime::UNIX_EPOCH }
    }

    fn transition() -> impl Strategy<Value = Transition> {
        prop_oneof![
            Just(Transition::Start),
            Just(Transition::Pause),
            Just(Transition::Resume),
            (0u32..256).prop_map(|status| Transition::Exited(exit(status))),
            Just(Transition::Delete),
        ]
    }

    proptest! {
        #[test]
        fn a_container_starts_once_stops_once_and_keeps_its_exit(steps in prop::collection::vec(transition(), 0..12)) {
            let mut state = ProcessState::Created;
            let (mut starts, mut first_exit, mut frozen) = (0, None, false);
            for step in steps {
                match state.after(step) {
                    Ok(Some(next)) => {
                        match step {
                            Transition::Start => starts += 1,
                            Transition::Exited(exit) => {
                                prop_assert_eq!(first_exit, None);
                                first_exit = Some(exit);
                            }
                            Transition::Pause => {
                                prop_assert!(starts == 1 && first_exit.is_none() && !frozen);
                                frozen = true;
                            }
                            Transition::Resume => {
                                prop_assert!(frozen && first_exit.is_none());
                                frozen = false;
                            }
                            Transition::Delete => prop_assert!(false, "delete leaves nothing"),
                        }
                        state = next;
                    }
                    Ok(None) => {
                        prop_assert_eq!(step, Transition::Delete);
                        prop_assert!(first_exit.is_some());
                        break;
                    }
                    Err(_) => {}
                }
                match state {
                    ProcessState::Stopped(exit) => prop_assert_eq!(Some(exit), first_exit),
                    ProcessState::Paused => prop_assert!(frozen),
                    ProcessState::Created | ProcessState::Running => prop_assert!(!frozen),
                }
            }
            prop_assert!(starts <= 1);
        }
    }

    proptest! {
        #[test]
        fn requests_are_allowed_as_the_life_of_a_container_demands(steps in prop::collection::vec(transition(), 0..12)) {
            let mut state = ProcessState::Created;
            let (mut started, mut frozen, mut stopped) = (false, false, false);
            for step in steps {
                let allowed = |request| state.allows(request).is_ok();
                prop_assert_eq!(allowed(PodRequest::Start), !started && !stopped);
                prop_assert_eq!(allowed(PodRequest::Pause), started && !frozen && !stopped);
                prop_assert_eq!(allowed(PodRequest::Resume), frozen && !stopped);
                prop_assert_eq!(allowed(PodRequest::Checkpoint), started && !stopped);
                prop_assert_eq!(allowed(PodRequest::Exec), !frozen && !stopped);
                prop_assert_eq!(allowed(PodRequest::Delete), stopped);
                for request in [PodRequest::Update, PodRequest::Signal, PodRequest::Resize] {
                    prop_assert_eq!(allowed(request), !stopped);
                }
                prop_assert_eq!(step.request().is_none_or(allowed) && !(stopped && step.request().is_none()),
                    state.after(step).is_ok());
                let Ok(next) = state.after(step) else { continue };
                let Some(next) = next else { break };
                started |= step == Transition::Start;
                frozen = next == ProcessState::Paused;
                stopped = matches!(next, ProcessState::Stopped(_));
                state = next;
            }
        }
    }

    #[test]
    fn refusals_have_a_reason() {
        assert_eq!(ProcessState::Stopped(exit(0)).allows(PodRequest::Signal), Err(StateError::Finished));
        assert_eq!(
            ProcessState::Stopped(exit(0)).allows(PodRequest::Resize),
            Err(StateError::AlreadyStopped)
        );
        assert_eq!(ProcessState::Paused.allows(PodRequest::Exec), Err(StateError::Paused));
        assert_eq!(ProcessState::Created.allows(PodRequest::Checkpoint), Err(StateError::NotStarted));
        assert_eq!(ProcessState::Running.after(Transition::Start), Err(StateError::AlreadyStarted));
        assert_eq!(ProcessState::Running.after(Transition::Delete), Err(StateError::StillRunning));
        assert_eq!(ProcessState::Stopped(exit(0)).after(Transition::Start), Err(StateError::AlreadyStopped));
        assert_eq!(ProcessState::Created.after(Transition::Pause), Err(StateError::NotStarted));
        assert_eq!(ProcessState::Paused.after(Transition::Pause), Err(StateError::Paused));
        assert_eq!(ProcessState::Paused.after(Transition::Delete), Err(StateError::Paused));
        assert_eq!(ProcessState::Running.after(Transition::Resume), Err(StateError::NotPaused));
        assert_eq!(ProcessState::Stopped(exit(0)).after(Transition::Pause), Err(StateError::AlreadyStopped));
    }
}
