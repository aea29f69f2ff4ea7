//! The states of a container and of every process in it, as one pure function, and their projection to OCI's
//! status words.
//!
//! ```text
//!                      Paused --------exited----------v
//!                  pause| ^resume                     Stopped --delete--> (gone)
//!   Created --start--> Running --------exited----------^  ^
//!      \------------------exited--------------------------/
//! ```

use std::time::SystemTime;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// 0..=255; 128+n when signal n ended the process.
    pub status: u32,
    pub at: SystemTime,
}

/// The state of a process. Each variant holds exactly what exists in that state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// The init waits in the guest; none of the user's code has run.
    Created,
    Running,
    /// Every process of the container is frozen; signals other than SIGKILL are delivered when it is resumed.
    Paused,
    Stopped(ProcessExit),
}

/// An event that changes the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    Start,
    Pause,
    Resume,
    /// The process ended by itself, by a signal, or with its VM.
    Exited(ProcessExit),
    Delete,
}

/// Why a request is not possible in the current state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("already started")]
    AlreadyStarted,
    #[error("has already stopped")]
    AlreadyStopped,
    #[error("is still running")]
    StillRunning,
    #[error("has not been started")]
    NotStarted,
    #[error("has no terminal")]
    NoTerminal,
    #[error("is paused")]
    Paused,
    #[error("is not paused")]
    NotPaused,
}

impl ProcessState {
    /// Returns the state after `transition`, or `None` when the container is removed.
    ///
    /// # Errors
    /// Why the transition is not possible in this state.
    pub fn after(self, transition: Transition) -> Result<Option<Self>, StateError> {
        match (self, transition) {
            (Self::Created, Transition::Start) | (Self::Paused, Transition::Resume) => {
                Ok(Some(Self::Running))
            }
            (Self::Running, Transition::Pause) => Ok(Some(Self::Paused)),
            (Self::Created | Self::Running | Self::Paused, Transition::Exited(exit)) => {
                Ok(Some(Self::Stopped(exit)))
            }
            (Self::Stopped(_), Transition::Delete) => Ok(None),
            (Self::Stopped(_), _) => Err(StateError::AlreadyStopped),
            (Self::Running | Self::Paused, Transition::Start) => Err(StateError::AlreadyStarted),
            (Self::Created, Transition::Pause | Transition::Resume) => Err(StateError::NotStarted),
            (Self::Paused, Transition::Pause | Transition::Delete) => Err(StateError::Paused),
            (Self::Running, Transition::Resume) => Err(StateError::NotPaused),
            (Self::Created | Self::Running, Transition::Delete) => Err(StateError::StillRunning),
        }
    }

    /// The status word of the runtime-spec (runtime.md, "State"), and runc's word for a state that the
    /// runtime-spec lacks.
    pub fn status(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
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

    #[test]
    fn refusals_have_a_reason() {
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
