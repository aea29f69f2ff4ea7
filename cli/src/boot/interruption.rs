//! Signals that end a start in the middle. Afterwards signals are passed on to the container.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::BootError;
use crate::oci::OciError;

/// The signals by which users end programs.
pub(crate) struct Interruption([(Signal, &'static str); 3]);

impl Interruption {
    /// # Errors
    /// Signals cannot be watched.
    pub(crate) fn watch() -> Result<Self, OciError> {
        let watch = |kind, name| {
            let signal = signal(kind).map_err(OciError::io("watch signals"))?;
            Ok::<_, OciError>((signal, name))
        };
        Ok(Self([
            watch(SignalKind::interrupt(), "SIGINT")?,
            watch(SignalKind::terminate(), "SIGTERM")?,
            watch(SignalKind::hangup(), "SIGHUP")?,
        ]))
    }

    /// What `work` returns, unless a signal arrives first. Then `work` is dropped.
    ///
    /// # Errors
    /// A signal has arrived.
    pub(crate) async fn unless<T>(&mut self, work: impl Future<Output = T>) -> Result<T, BootError> {
        let [(first, first_name), (second, second_name), (third, third_name)] = &mut self.0;
        let signal = tokio::select! {
            done = work => return Ok(done),
            _ = first.recv() => *first_name,
            _ = second.recv() => *second_name,
            _ = third.recv() => *third_name,
        };
        Err(BootError::Interrupted { signal })
    }
}
