//! Sends events to containerd, in the order in which they occurred.
//!
//! One task sends all of them in sequence, so a retry cannot reorder them.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::{self, context},
};
use machinen::pod::event::PodEvent;
use machinen_task::events::{encode, timestamp};
use protobuf::{MessageField, well_known_types::any::Any};
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};

/// Number of attempts for an event. An attempt fails while containerd restarts.
const TRIES: u32 = 5;
/// Wait between attempts; containerd takes about this long to restart.
const BACKOFF: Duration = Duration::from_secs(1);
const CALL_NS: i64 = 5_000_000_000;

/// Sends events to containerd's ttrpc socket.
pub(crate) struct Publisher {
    namespace: String,
    address: Option<String>,
    client: Option<EventsClient>,
}

impl Publisher {
    /// Without an address (the shim was started by hand) events only go to the log.
    pub(crate) fn new(namespace: String, address: Option<String>) -> Self {
        let address = address
            .filter(|address| !address.is_empty())
            .map(|address| if address.contains("://") { address } else { format!("unix://{address}") });
        Self { namespace, address, client: None }
    }

    /// Sends events until all senders are dropped, or, after `last` has resolved, until the pending events
    /// are sent.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<PodEvent>,
        mut last: oneshot::Receiver<()>,
    ) {
        let mut more = true;
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                _ = &mut last, if more => {
                    more = false;
                    events.close();
                    continue;
                }
            };
            let Some(event) = event else { break };
            let (topic, body) = encode(event);
            match body {
                Ok(body) => self.publish(topic, body).await,
                Err(error) => tracing::error!(topic, "event cannot be encoded: {error}"),
            }
        }
    }

    async fn publish(&mut self, topic: &'static str, body: Any) {
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(timestamp(SystemTime::now())),
                namespace: self.namespace.clone(),
                topic: topic.to_owned(),
                event: MessageField::some(body),
                ..Default::default()
            }),
            ..Default::default()
        };
        for attempt in 1..=TRIES {
            let reused = self.client.is_some();
            match self.forward(&request).await {
                Ok(()) => return,
                Err(error) if attempt == TRIES => tracing::error!(topic, "event dropped: {error}"),
                Err(error) => {
                    tracing::debug!(topic, attempt, "event not accepted: {error}");
                    self.client = None;
                    // The connection may date from before a restart of containerd, so a failure of it does
                    // not mean that containerd is absent. A new connection is tried at once, because a shim
                    // that is about to end has little time.
                    if !reused {
                        sleep(BACKOFF).await;
                    }
                }
            }
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let Some(address) = &self.address else { return Ok(()) };
        let client = match &self.client {
            Some(client) => client,
            None => self.client.insert(EventsClient::new(Client::connect(address).await?)),
        };
        client.forward(context::with_timeout(CALL_NS), request).await?;
        Ok(())
    }
}
