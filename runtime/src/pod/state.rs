//! The life of a container as one pure function, and its projection to OCI's status words.
//!
//! ```text
//!   Created --start--> Running --exited--> Stopped --delete--> (gone)
//!      \------------------exited-------------^
//! ```

use std::time::SystemTime;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255; 128+n when signal n ended the process.
    pub status: u32,
    pub at: SystemTime,
    /// The guest kernel's OOM killer ended a process of the container.
    pub oom_killed: bool,
}

/// Where a container is in its life. Each state holds exactly what exists in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its init waits in the guest; nothing of the user's has run.
    Created,
    Running,
    Stopped(Exit),
}

/// What may happen to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    Start,
    /// The init ended by itself, by a signal, or with its VM.
    Exited(Exit),
    Delete,
}

/// Why something may not happen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("already started")]
    AlreadyStarted,
    #[error("has already stopped")]
    AlreadyStopped,
    #[error("is still running")]
    StillRunning,
}

impl State {
    /// The state after `transition`, or `None` when the container is gone.
    ///
    /// # Errors
    /// Why the transition may not happen in this state.
    pub fn after(self, transition: Transition) -> Result<Option<Self>, StateError> {
        match (self, transition) {
            (Self::Created, Transition::Start) => Ok(Some(Self::Running)),
            (Self::Running, Transition::Start) => Err(StateError::AlreadyStarted),
            (Self::Created | Self::Running, Transition::Exited(exit)) => Ok(Some(Self::Stopped(exit))),
            (Self::Stopped(_), Transition::Start | Transition::Exited(_)) => Err(StateError::AlreadyStopped),
            (Self::Stopped(_), Transition::Delete) => Ok(None),
            (Self::Created | Self::Running, Transition::Delete) => Err(StateError::StillRunning),
        }
    }

    /// The status word of the runtime-spec (runtime.md, "State").
    pub fn status(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH, oom_killed: false }
    }

    fn transition() -> impl Strategy<Value = Transition> {
        prop_oneof![
            Just(Transition::Start),
            (0u32..256).prop_map(|status| Transition::Exited(exit(status))),
            Just(Transition::Delete),
        ]
    }

    proptest! {
        #[test]
        fn a_container_starts_once_stops_once_and_keeps_its_exit(steps in prop::collection::vec(transition(), 0..12)) {
            let mut state = State::Created;
            let (mut starts, mut first_exit) = (0, None);
            for step in steps {
                match state.after(step) {
                    Ok(Some(next)) => {
                        match step {
                            Transition::Start => starts += 1,
                            Transition::Exited(exit) => {
                                prop_assert_eq!(first_exit, None);
                                first_exit = Some(exit);
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
                if let State::Stopped(exit) = state {
                    prop_assert_eq!(Some(exit), first_exit);
                }
            }
            prop_assert!(starts <= 1);
        }
    }

    #[test]
    fn refusals_say_why() {
        assert_eq!(State::Running.after(Transition::Start), Err(StateError::AlreadyStarted));
        assert_eq!(State::Running.after(Transition::Delete), Err(StateError::StillRunning));
        assert_eq!(State::Stopped(exit(0)).after(Transition::Start), Err(StateError::AlreadyStopped));
    }
}
