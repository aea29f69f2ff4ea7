//! The host's clock for the end of a container. It starts with the first SIGKILL, and nothing that the guest
//! answers or sends stops it.
//!
//! ```text
//!   SIGKILL --5 s--> output that its reader does not accept is dropped --10 s--> the VM is killed
//!   the init has ended --> its changes are exported, within the limits of an export --> Stopped
//! ```

use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep_until},
};

/// How long after SIGKILL the readers of the output are waited for. A reader that accepts nothing keeps an
/// honest guest from reporting the end of the process.
pub(super) const READER_PATIENCE: Duration = Duration::from_secs(5);
/// How long after SIGKILL the guest may take until all processes of the container have ended and their output
/// has arrived.
pub(super) const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Measures the time since a container was first sent SIGKILL.
#[derive(Debug, Default)]
pub(super) struct KillClock(watch::Sender<Option<Instant>>);

impl KillClock {
    /// Starts the clock, unless it runs already.
    pub(super) fn start(&self) {
        self.0.send_if_modified(|since| {
            let first = since.is_none();
            since.get_or_insert_with(Instant::now);
            first
        });
    }

    /// Resolves when the clock has started.
    pub(super) async fn started(&self) {
        self.reaches(Duration::ZERO).await;
    }

    /// Resolves when the clock has run for `limit`.
    pub(super) async fn reaches(&self, limit: Duration) {
        let mut clock = self.0.subscribe();
        let since = *clock.wait_for(Option::is_some).await.expect("the sender lives in self");
        let since = since.expect("waited for");
        sleep_until(since + limit).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_sigkill_starts_the_clock() {
        let clock = KillClock::default();
        let begin = Instant::now();
        tokio::join!(clock.reaches(KILL_PATIENCE), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            clock.start();
            tokio::time::sleep(Duration::from_secs(4)).await;
            clock.start();
        });
        assert_eq!(begin.elapsed(), Duration::from_secs(3) + KILL_PATIENCE);
        clock.started().await;
        assert_eq!(begin.elapsed(), Duration::from_secs(3) + KILL_PATIENCE);
    }
}
