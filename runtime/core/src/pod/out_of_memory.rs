//! Reports that a running container has run out of memory.

use std::sync::atomic::{AtomicU64, Ordering};

use machinen_base::error::chain;
use machinen_protocol::api::WaitOutOfMemoryResponse;
use machinen_vm::agent;
use tokio::time::{Duration, sleep};

use super::{Container, Pod, PodEvent};

/// Shortest time between two events of a container, because a guest may claim any number of kills.
const PACE: Duration = Duration::from_secs(1);

impl Pod {
    /// Emits an event when the guest's kernel has killed processes because the container was out of memory,
    /// and stores the number of kills in `reported`. Returns when there is nothing left to watch.
    pub(super) async fn watch_memory(
        &self,
        container: &Container,
        agent: &agent::Client,
        reported: &AtomicU64,
    ) {
        loop {
            let seen = reported.load(Ordering::Relaxed);
            match agent.wait_out_of_memory(&container.id, seen).await {
                Ok(WaitOutOfMemoryResponse { killed, ended, .. }) => {
                    if killed > seen {
                        reported.store(killed, Ordering::Relaxed);
                        self.emit(PodEvent::OutOfMemory { id: container.id.clone() });
                        tracing::info!(id = container.id.as_str(), killed, "out of memory");
                    }
                    if ended {
                        return;
                    }
                    sleep(PACE).await;
                }
                Err(error) => {
                    // The task that waits for the container's end reports the reason.
                    tracing::debug!(
                        id = container.id.as_str(),
                        "cannot watch for out-of-memory kills: {}",
                        chain(&error)
                    );
                    return;
                }
            }
        }
    }
}
