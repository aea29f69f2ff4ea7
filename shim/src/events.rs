//! Sends events to containerd, in the order in which they occurred.
//!
//! One task sends all of them in sequence, so a retry cannot reorder them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::{
    api::{self, ForwardRequest},
    events::task::{
        TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    topics,
    ttrpc::{self, context},
};
use machinen::pod::{CreateRequest, event::PodEvent, stdio::StdioNames};
use protobuf::{
    MessageField,
    well_known_types::{any::Any, timestamp::Timestamp},
};
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
pub struct Publisher {
    namespace: String,
    address: Option<String>,
    client: Option<EventsClient>,
}

impl Publisher {
    /// Without an address (the shim was started by hand) events only go to the log.
    pub fn new(namespace: String, address: Option<String>) -> Self {
        let address = address
            .filter(|address| !address.is_empty())
            .map(|address| if address.contains("://") { address } else { format!("unix://{address}") });
        Self { namespace, address, client: None }
    }

    /// Sends events until all senders are dropped, or, after `last` has resolved, until the pending events
    /// are sent.
    pub async fn run(
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
            let (topic, body) = self.encode(event);
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

    fn encode(&self, event: PodEvent) -> (&'static str, protobuf::Result<Any>) {
        match event {
            PodEvent::Created { pid, create } => {
                (topics::TASK_CREATE_EVENT_TOPIC, any(&created(pid, *create)))
            }
            PodEvent::Started { id, pid } => {
                let body = TaskStart { container_id: id, pid, ..Default::default() };
                (topics::TASK_START_EVENT_TOPIC, any(&body))
            }
            PodEvent::Paused { id } => {
                (topics::TASK_PAUSED_EVENT_TOPIC, any(&TaskPaused { container_id: id, ..Default::default() }))
            }
            PodEvent::Resumed { id } => (
                topics::TASK_RESUMED_EVENT_TOPIC,
                any(&TaskResumed { container_id: id, ..Default::default() }),
            ),
            PodEvent::Checkpointed { id, path } => {
                let checkpoint = path.display().to_string();
                let body = TaskCheckpointed { container_id: id, checkpoint, ..Default::default() };
                (topics::TASK_CHECKPOINTED_EVENT_TOPIC, any(&body))
            }
            PodEvent::OutOfMemory { id } => {
                (topics::TASK_OOM_EVENT_TOPIC, any(&TaskOOM { container_id: id, ..Default::default() }))
            }
            PodEvent::ExecAdded { id, exec_id } => {
                let body = TaskExecAdded { container_id: id, exec_id, ..Default::default() };
                (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&body))
            }
            PodEvent::ExecStarted { id, exec_id, pid } => {
                let body = TaskExecStarted { container_id: id, exec_id, pid, ..Default::default() };
                (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&body))
            }
            PodEvent::Exited { id, exec_id, pid, exit } => {
                let body = TaskExit {
                    id: if exec_id.is_empty() { id.clone() } else { exec_id },
                    container_id: id,
                    pid,
                    exit_status: exit.status,
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..Default::default()
                };
                (topics::TASK_EXIT_EVENT_TOPIC, any(&body))
            }
            PodEvent::Deleted { id, pid, exit } => {
                let body = TaskDelete {
                    container_id: id.clone(),
                    id,
                    pid,
                    exit_status: exit.status,
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..Default::default()
                };
                (topics::TASK_DELETE_EVENT_TOPIC, any(&body))
            }
        }
    }
}

/// The event repeats the request, as containerd's clients expect.
fn created(pid: u32, create: CreateRequest) -> TaskCreate {
    let StdioNames { stdin, stdout, stderr, terminal } = create.stdio;
    let rootfs = create.rootfs.into_iter().map(|mount| api::Mount {
        type_: mount.kind,
        source: mount.source.display().to_string(),
        options: mount.options,
        ..Default::default()
    });
    TaskCreate {
        container_id: create.id,
        bundle: create.bundle.display().to_string(),
        rootfs: rootfs.collect(),
        io: MessageField::some(TaskIO { stdin, stdout, stderr, terminal, ..Default::default() }),
        checkpoint: create.checkpoint.map(|path| path.display().to_string()).unwrap_or_default(),
        pid,
        ..Default::default()
    }
}

/// Packs a message under its bare full name, which is the name of events in containerd's registry of types
/// (containerd, typeurl).
pub fn any<M: protobuf::MessageFull>(message: &M) -> protobuf::Result<Any> {
    let type_url = M::descriptor().full_name().to_owned();
    Ok(Any { type_url, value: message.write_to_bytes()?, ..Default::default() })
}

/// Wall-clock time in protobuf's format; times before 1970 become 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs().try_into().unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().try_into().expect("less than a billion"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use machinen::pod::{rootfs::RootfsMount, state::ProcessExit};
    use protobuf::Message;

    use super::*;

    #[test]
    fn an_exit_carries_the_names_containerd_looks_for() {
        let publisher = Publisher::new("default".to_owned(), None);
        let exit =
            ProcessExit { status: 137, at: UNIX_EPOCH + Duration::from_millis(1500), oom_killed: false };
        for (exec_id, process) in [("", "c"), ("e", "e")] {
            let event = PodEvent::Exited { id: "c".to_owned(), exec_id: exec_id.to_owned(), pid: 7, exit };
            let (topic, body) = publisher.encode(event);
            let body = body.unwrap();
            assert_eq!((topic, body.type_url.as_str()), ("/tasks/exit", "containerd.events.TaskExit"));
            let decoded = TaskExit::parse_from_bytes(&body.value).unwrap();
            let names = (decoded.id.as_str(), decoded.container_id.as_str());
            assert_eq!((names, decoded.exit_status), ((process, "c"), 137));
            assert_eq!((decoded.exited_at.seconds, decoded.exited_at.nanos), (1, 500_000_000));
        }
    }

    #[test]
    fn a_create_event_repeats_the_request() {
        let publisher = Publisher::new("default".to_owned(), None);
        let mount = RootfsMount {
            kind: "overlay".to_owned(),
            source: "overlay".into(),
            options: vec!["lowerdir=/l".to_owned()],
        };
        let create = CreateRequest {
            id: "c".to_owned(),
            bundle: "/b".into(),
            rootfs: vec![mount],
            stdio: StdioNames { stdin: "/in".to_owned(), terminal: true, ..StdioNames::default() },
            checkpoint: Some("/cp".into()),
        };
        let (topic, body) = publisher.encode(PodEvent::Created { pid: 7, create: Box::new(create) });
        let decoded = TaskCreate::parse_from_bytes(&body.unwrap().value).unwrap();
        assert_eq!((topic, decoded.container_id.as_str(), decoded.pid), ("/tasks/create", "c", 7));
        assert_eq!((decoded.bundle.as_str(), decoded.checkpoint.as_str()), ("/b", "/cp"));
        assert_eq!((decoded.io.stdin.as_str(), decoded.io.terminal), ("/in", true));
        assert_eq!(
            (decoded.rootfs[0].type_.as_str(), &decoded.rootfs[0].options[..]),
            ("overlay", &["lowerdir=/l".to_owned()][..])
        );
    }
}
