//! Receives a shim's events in containerd's place, because containerd's log has their topics only.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, mpsc},
};

use anyhow::{Context, Result};
use containerd_shim_protos::{
    api::ForwardRequest,
    events::task::TaskCreate,
    protobuf::{Message, well_known_types::empty::Empty},
    shim::event::Envelope,
    shim_sync::{Events, create_events},
    topics::TASK_CREATE_EVENT_TOPIC,
};
use ttrpc::{Server, TtrpcContext};

use crate::process::DEADLINE;

/// A server for the events of shims.
#[expect(missing_debug_implementations, reason = "ttrpc's server has none")]
pub struct EventServer {
    /// Serves until it is dropped.
    _server: Server,
    socket: PathBuf,
    received: mpsc::Receiver<Envelope>,
}

struct Receiver(Mutex<mpsc::Sender<Envelope>>);

impl Events for Receiver {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        // The test may have ended.
        let _ = self.0.lock().expect("the lock is not poisoned").send(request.envelope.unwrap_or_default());
        Ok(Empty::new())
    }
}

impl EventServer {
    /// Serves on a socket in `dir`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(dir: &Path) -> Result<Self> {
        let socket = dir.join("events.sock");
        let (sender, received) = mpsc::channel();
        let service = create_events(Arc::new(Receiver(Mutex::new(sender))));
        let server = Server::new().bind(&format!("unix://{}", socket.display()));
        let mut server = server.context("cannot bind the socket for events")?.register_service(service);
        server.start().context("cannot serve events")?;
        Ok(Self { _server: server, socket, received })
    }

    /// Shell commands for [`crate::shim::Shim::serve_in`], after which a shim sends its events here.
    pub fn environment(&self) -> String {
        format!("export TTRPC_ADDRESS={}", self.socket.display())
    }

    /// Waits for the next event of a create. Events of other topics are ignored.
    ///
    /// # Errors
    /// No event arrives in time, or it cannot be decoded.
    pub fn created(&self) -> Result<TaskCreate> {
        loop {
            let envelope = self.received.recv_timeout(DEADLINE).context("no create was reported")?;
            if envelope.topic == TASK_CREATE_EVENT_TOPIC {
                return Ok(TaskCreate::parse_from_bytes(&envelope.event.value)?);
            }
        }
    }
}
