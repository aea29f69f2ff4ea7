//! Telling that a container has run out of memory, while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use machinen_protocol::api::WaitOutOfMemoryResponse;
use tokio::time::{Duration, sleep};

use super::{Container, Event, Pod};
use crate::{agent, error::chain};

/// Least time between two events of a container: a guest may claim as many kills as it likes.
const PACE: Duration = Duration::from_secs(1);

impl Pod {
    /// Emits an event whenever the guest's kernel has killed for want of memory, and notes in `told` how many kills
    /// that were. Returns when there is nothing more to watch.
    pub(super) async fn watch_memory(&self, container: &Container, agent: &agent::Client, told: &AtomicU64) {
        loop {
            let seen = told.load(Ordering::Relaxed);
            match agent.wait_out_of_memory(&container.id, seen).await {
                Ok(WaitOutOfMemoryResponse { killed, ended, .. }) => {
                    if killed > seen {
                        told.store(killed, Ordering::Relaxed);
                        self.emit(Event::OutOfMemory { id: container.id.clone() });
                        tracing::info!(id = container.id, killed, "out of memory");
                    }
                    if ended {
                        return;
                    }
                    sleep(PACE).await;
                }
                Err(error) => {
                    // Whoever waits for the end of the container tells why.
                    tracing::debug!(id = container.id, "memory is not watched any more: {}", chain(&error));
                    return;
                }
            }
        }
    }
}
