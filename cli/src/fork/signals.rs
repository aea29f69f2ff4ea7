//! Signals that end a fork: it finishes its step and takes back what it has made.

use std::task::{Context, Waker};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::ForkError;

/// Signals that come while this exists do not end the program.
#[derive(Debug)]
pub(super) struct Signals(Vec<(&'static str, Signal)>);

impl Signals {
    /// # Errors
    /// They cannot be caught.
    pub(super) fn catch() -> Result<Self, ForkError> {
        let kinds = [
            ("SIGINT", SignalKind::interrupt()),
            ("SIGTERM", SignalKind::terminate()),
            ("SIGHUP", SignalKind::hangup()),
        ];
        let caught = kinds.into_iter().map(|(name, kind)| Ok((name, signal(kind)?)));
        caught.collect::<Result<_, _>>().map(Self).map_err(ForkError::Start)
    }

    /// # Errors
    /// One has come.
    pub(super) fn check(&mut self) -> Result<(), ForkError> {
        let mut context = Context::from_waker(Waker::noop());
        for (name, signal) in &mut self.0 {
            if signal.poll_recv(&mut context).is_ready() {
                return Err(ForkError::Interrupted { signal: name });
            }
        }
        Ok(())
    }
}
