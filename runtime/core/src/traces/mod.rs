//! Traces of operations for OpenTelemetry, off unless an endpoint is configured.
//!
//! ```text
//!   create, start, checkpoint ── Operation ──> queue (bounded, full: dropped) ── one task ──> OTLP/HTTP, JSON
//! ```
//! No operation waits for the receiver of its spans. Each is a span with a child for each of its phases, and itself a child
//! of the client's span where containerd passes one on (W3C trace context).

mod encode;
mod parent;
mod send;

use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use machinen_base::error::chain;
use tokio::sync::mpsc::{self, Receiver, Sender, error::TrySendError};

pub use parent::{TraceParent, inherit, within};
pub use send::{Endpoint, EndpointError};

/// Operations that may wait for the receiver. A shim has few at a time.
const WAITING: usize = 64;

/// A part of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) start: SystemTime,
    pub(crate) end: SystemTime,
}

/// What was done to one container.
#[derive(Debug)]
pub(crate) struct Operation {
    name: &'static str,
    container: String,
    pod: String,
    parent: Option<TraceParent>,
    start: SystemTime,
    end: SystemTime,
    phases: Vec<Phase>,
    /// Why it has failed.
    error: Option<String>,
}

/// Reports operations. Clones report to the same receiver.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traces(Option<Arc<Exporter>>);

#[derive(Debug)]
struct Exporter {
    endpoint: Endpoint,
    queue: OnceLock<Sender<Operation>>,
}

/// An operation that is in progress. None: it is not traced.
#[derive(Debug)]
pub(crate) struct Running(Option<(Arc<Exporter>, Operation)>);

impl Traces {
    /// None: nothing is traced.
    pub(crate) fn to(endpoint: Option<Endpoint>) -> Self {
        Self(endpoint.map(|endpoint| Arc::new(Exporter { endpoint, queue: OnceLock::new() })))
    }

    /// Begins an operation of the client whose trace context this task has.
    pub(crate) fn begin(&self, name: &'static str, pod: &str, container: &str) -> Running {
        let parent = parent::current();
        // A client that has decided not to record its own spans does not want ours.
        let wanted = self.0.as_ref().filter(|_| parent.is_none_or(TraceParent::is_sampled));
        Running(wanted.map(|exporter| {
            let start = SystemTime::now();
            let operation = Operation {
                name,
                container: container.to_owned(),
                pod: pod.to_owned(),
                parent,
                start,
                end: start,
                phases: Vec::new(),
                error: None,
            };
            (Arc::clone(exporter), operation)
        }))
    }
}

impl Running {
    /// Ends the operation and reports it. `phases` is asked only if somebody wants to know.
    pub(crate) fn end<T, E: std::error::Error + 'static>(
        self,
        result: &Result<T, E>,
        phases: impl FnOnce() -> Vec<Phase>,
    ) {
        let Some((exporter, mut operation)) = self.0 else { return };
        operation.end = SystemTime::now();
        operation.phases = phases();
        operation.error = result.as_ref().err().map(|error| chain(error).to_string());
        exporter.report(operation);
    }
}

impl Exporter {
    fn report(&self, operation: Operation) {
        let queue = self.queue.get_or_init(|| {
            let (queue, operations) = mpsc::channel(WAITING);
            tokio::spawn(export(self.endpoint.clone(), operations));
            queue
        });
        match queue.try_send(operation) {
            Ok(()) => {}
            Err(TrySendError::Full(lost) | TrySendError::Closed(lost)) => {
                tracing::debug!(id = lost.container, "the trace of {} is dropped: too many wait", lost.name);
            }
        }
    }
}

/// Sends operations until there are no more.
async fn export(endpoint: Endpoint, mut operations: Receiver<Operation>) {
    let mut reachable = true;
    while let Some(first) = operations.recv().await {
        let mut batch = vec![first];
        while let Ok(next) = operations.try_recv() {
            batch.push(next);
        }
        match send::post(&endpoint, &encode::request(&batch)).await {
            Ok(()) => reachable = true,
            // Once, not for each of them.
            Err(error) if std::mem::take(&mut reachable) => {
                tracing::warn!("traces are lost: {}", chain(&error));
            }
            Err(error) => tracing::debug!("traces are lost: {}", chain(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[tokio::test]
    async fn a_receiver_that_does_not_answer_delays_nothing() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let traces = Traces::to(Some(Endpoint::parse(&endpoint).unwrap()));
        for _ in 0..1000 {
            traces.begin("create", "p", "c").end(&Ok::<(), io::Error>(()), Vec::new);
        }
        let queue = traces.0.as_ref().unwrap().queue.get().unwrap();
        assert_eq!(queue.max_capacity() - queue.capacity(), WAITING);
    }

    #[tokio::test]
    async fn what_is_off_asks_for_nothing() {
        let off = Traces::to(None);
        off.begin("create", "p", "c").end(&Ok::<(), io::Error>(()), || panic!("asked for the phases"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}/", listener.local_addr().unwrap());
        let traces = Traces::to(Some(Endpoint::parse(&endpoint).unwrap()));
        let unsampled = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00");
        within(unsampled, async {
            traces.begin("create", "p", "c").end(&Ok::<(), io::Error>(()), || panic!("it is not recorded"));
        })
        .await;
    }
}
