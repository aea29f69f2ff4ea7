//! Signals that end a fork, after it has finished its current step and undone what it has made.

use std::task::{Context, Waker};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::ForkError;

/// Signals that come while this exists do not end the program.
#[derive(Debug)]
pub(super) struct Signals(Vec<(&'static str, Signal)>);

impl Signals {
    /// # Errors
    /// The signals cannot be caught.
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
    /// A signal has arrived.
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
