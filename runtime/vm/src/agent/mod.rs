//! Client of the guest agent: one method for each call, each with a deadline.

mod stream_end;

use std::{net::Ipv4Addr, time::Duration};

use machinen_base::{
    error::{ErrorKind, HasKind},
    text::printable,
};
use machinen_protocol::{
    api::{
        AgentClient, CheckpointContainerRequest, CheckpointContainerResponse, CheckpointImagesResponse,
        ConfigureNetworkRequest, ConfigureRequest, ConfigureResponse, ContainerRequest,
        CreateContainerRequest, CreateContainerResponse, DialLocalhostRequest, Empty, EndStdinRequest,
        ExecProcessRequest, ExportLayerRequest, ForwardNameserversRequest, OpenViewRequest, ProcessRequest,
        ResizeTerminalRequest, SetClockRequest, SignalProcessRequest, WaitProcessResponse,
        WatchListenersRequest,
    },
    localhost::LocalPort,
    process::{ProcessRef, SignalTarget},
};
use ttrpc::Code;

use crate::BoxedStream;
use stream_end::StreamEnd;

/// Deadline of calls that only look up or forward something.
const QUICK: Duration = Duration::from_secs(20);
/// Deadline of calls that mount, start processes or clean up, on an emulated CPU that is shared with others.
const LONG: Duration = Duration::from_secs(120);

/// Deadline of a dump: some gigabytes of memory at the speed of an emulated CPU.
const DUMP: Duration = Duration::from_secs(15 * 60);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error.
    #[error("guest agent: {message}")]
    Refused {
        /// What the error means, as a ttrpc code.
        code: Code,
        /// The chain of errors of the agent, fit to be shown.
        message: String,
    },
    /// The control stream has ended.
    #[error("guest agent: the connection is closed")]
    Closed,
    /// The agent took too long.
    #[error("guest agent: no answer to {call} within {deadline:?}")]
    Deadline {
        /// The name of the call.
        call: &'static str,
        /// How long the host has waited.
        deadline: Duration,
    },
    /// The answer is not one that the call can have.
    #[error("guest agent: {call} went wrong")]
    Protocol {
        /// The name of the call.
        call: &'static str,
        /// What the ttrpc client reports.
        source: ttrpc::Error,
    },
}

impl HasKind for AgentError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { code, .. } => (*code).into(),
            Self::Closed => ErrorKind::Unavailable,
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Protocol { .. } => ErrorKind::Internal,
        }
    }
}

/// The agent of one VM. Clones share the connection, and calls may be made concurrently.
#[derive(Clone)]
pub struct Client {
    inner: AgentClient,
    ended: StreamEnd,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// Makes one call, with a deadline or without one.
macro_rules! call {
    ($self:ident.$method:ident($request:expr), $deadline:expr) => {
        finish(
            stringify!($method),
            $deadline,
            &$self.ended,
            $self.inner.$method(ttrpc::context::Context::default(), &$request),
        )
        .await
    };
}

// Declared after the macro that it uses.
mod cgroup_calls;
mod volume_calls;

impl Client {
    /// Uses a control stream whose handshake is done. Must be called inside a tokio runtime.
    pub fn new(control: BoxedStream) -> Self {
        let ended = StreamEnd::default();
        let socket = ttrpc::r#async::transport::Socket::new(ended.watch(control));
        Self { ended, inner: AgentClient::new(ttrpc::r#async::Client::new(socket)) }
    }

    /// Configures the guest with values that it cannot know. Must precede every other call.
    ///
    /// # Errors
    /// See [`AgentError`], as for every call.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<ConfigureResponse, AgentError> {
        call!(self.configure(request), Some(QUICK))
    }

    /// Gives the VM's network devices their names, addresses and routes, and hides the other devices.
    ///
    /// # Errors
    /// A value is not valid, a device does not exist, or the guest's kernel refuses.
    pub async fn configure_network(&self, request: ConfigureNetworkRequest) -> Result<(), AgentError> {
        call!(self.configure_network(request), Some(QUICK)).map(nothing)
    }

    /// Has the guest send what containers send to these nameservers on the stream with this token.
    ///
    /// # Errors
    /// The stream does not exist, or the guest's kernel refuses.
    pub async fn forward_nameservers(&self, nameservers: &[Ipv4Addr], stream: u64) -> Result<(), AgentError> {
        let nameservers = nameservers.iter().map(|address| address.octets().to_vec()).collect();
        let request = ForwardNameserversRequest { nameservers, stream, ..Default::default() };
        call!(self.forward_nameservers(request), Some(QUICK)).map(nothing)
    }

    /// Has the guest report the ports of localhost on which it listens, on the stream with this token.
    ///
    /// # Errors
    /// The stream does not exist, or the guest's kernel cannot report that.
    pub async fn watch_listeners(&self, stream: u64) -> Result<(), AgentError> {
        let request = WatchListenersRequest { stream, ..Default::default() };
        call!(self.watch_listeners(request), Some(QUICK)).map(nothing)
    }

    /// Connects the stream with this token with a port of the guest's localhost.
    ///
    /// # Errors
    /// The stream does not exist, or nothing accepts the connection.
    pub async fn dial_localhost(&self, port: LocalPort, stream: u64) -> Result<(), AgentError> {
        let LocalPort { udp, ipv6, port } = port;
        let request = DialLocalhostRequest { ipv6, port: port.into(), stream, udp, ..Default::default() };
        call!(self.dial_localhost(request), Some(LONG)).map(nothing)
    }

    /// Sets the guest's wall clock, to nanoseconds since the Unix epoch.
    ///
    /// # Errors
    /// The time is not after the epoch.
    pub async fn set_clock(&self, realtime_ns: i64) -> Result<(), AgentError> {
        let request = SetClockRequest { realtime_ns, ..SetClockRequest::default() };
        call!(self.set_clock(request), Some(QUICK)).map(nothing)
    }

    /// Prepares a container; its init waits when this returns.
    ///
    /// # Errors
    /// The codes that `agent.proto` lists for this call.
    pub async fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse, AgentError> {
        let deadline = if request.checkpoint.is_some() { DUMP } else { LONG };
        call!(self.create_container(request), Some(deadline))
    }

    /// Lets the waiting init execute the command, after the container's startContainer hooks, which may take as long
    /// as `hooks`.
    ///
    /// # Errors
    /// The container does not exist, its init is not waiting, or a hook fails.
    pub async fn start_container(&self, container: &str, hooks: Duration) -> Result<(), AgentError> {
        let deadline = LONG.saturating_add(hooks);
        call!(self.start_container(container_request(container)), Some(deadline)).map(nothing)
    }

    /// Resolves when the process has ended and its output has been sent. There is no deadline.
    ///
    /// # Errors
    /// The process does not exist.
    pub async fn wait_process(
        &self,
        container: &str,
        process: &ProcessRef,
    ) -> Result<WaitProcessResponse, AgentError> {
        call!(self.wait_process(process_request(container, process)), None)
    }

    /// Runs an additional process in a container; it is running when this returns.
    ///
    /// # Errors
    /// The codes that `agent.proto` lists for this call.
    pub async fn exec_process(&self, request: ExecProcessRequest) -> Result<(), AgentError> {
        call!(self.exec_process(request), Some(LONG)).map(nothing)
    }

    /// Removes a process that has ended. Succeeds if the process does not exist.
    ///
    /// # Errors
    /// The process is still running, or the container does not exist.
    pub async fn delete_process(&self, container: &str, process: &ProcessRef) -> Result<(), AgentError> {
        call!(self.delete_process(process_request(container, process)), Some(QUICK)).map(nothing)
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// The process does not exist, or has no terminal.
    pub async fn resize_terminal(
        &self,
        container: &str,
        process: &ProcessRef,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            container_id: container.to_owned(),
            exec_id: process.to_wire(),
            width,
            height,
            ..ResizeTerminalRequest::default()
        };
        call!(self.resize_terminal(request), Some(QUICK)).map(nothing)
    }

    /// Sends a signal to one process, or to every process of the container.
    ///
    /// # Errors
    /// The process does not exist.
    pub async fn signal_process(
        &self,
        container: &str,
        target: &SignalTarget,
        signal: u32,
    ) -> Result<(), AgentError> {
        let (exec_id, all) = target.to_wire();
        let request = SignalProcessRequest {
            container_id: container.to_owned(),
            exec_id,
            signal,
            all,
            ..SignalProcessRequest::default()
        };
        call!(self.signal_process(request), Some(QUICK)).map(nothing)
    }

    /// Reports that stdin has ended after `total_bytes`.
    ///
    /// # Errors
    /// The process does not exist.
    pub async fn end_stdin(
        &self,
        container: &str,
        process: &ProcessRef,
        total_bytes: u64,
    ) -> Result<(), AgentError> {
        let request = EndStdinRequest {
            container_id: container.to_owned(),
            exec_id: process.to_wire(),
            total_bytes,
            ..EndStdinRequest::default()
        };
        call!(self.end_stdin(request), Some(QUICK)).map(nothing)
    }

    /// Removes what is left of a container. Succeeds if the container does not exist.
    ///
    /// # Errors
    /// The container is still running, or a part of it cannot be removed.
    pub async fn delete_container(&self, container: &str) -> Result<(), AgentError> {
        call!(self.delete_container(container_request(container)), Some(LONG)).map(nothing)
    }

    /// Has the agent send the container's changes to the stream with this token; returns the size of the
    /// archive. There is no deadline, because the reader of the stream notices whether it makes progress.
    ///
    /// # Errors
    /// The container or stream does not exist, or the container's files cannot be read.
    pub async fn export_layer(&self, container: &str, stream: u64) -> Result<u64, AgentError> {
        let request = ExportLayerRequest {
            container_id: container.to_owned(),
            stream,
            ..ExportLayerRequest::default()
        };
        call!(self.export_layer(request), None).map(|answer| answer.total_bytes)
    }

    /// Has the agent serve the container's files on the stream with this token, with what is mounted in the container's
    /// root file system or without.
    ///
    /// # Errors
    /// The container or stream does not exist, or the container has ended.
    pub async fn open_view(
        &self,
        container: &str,
        stream: u64,
        without_mounts: bool,
    ) -> Result<(), AgentError> {
        let container_id = container.to_owned();
        let request = OpenViewRequest { container_id, stream, without_mounts, ..OpenViewRequest::default() };
        call!(self.open_view(request), Some(QUICK)).map(nothing)
    }

    /// Dumps a paused container onto a disk.
    ///
    /// # Errors
    /// The codes that `agent.proto` lists for this call.
    pub async fn checkpoint_container(
        &self,
        request: CheckpointContainerRequest,
    ) -> Result<CheckpointContainerResponse, AgentError> {
        call!(self.checkpoint_container(request), Some(DUMP))
    }

    /// Where on its disk some more of the last dump is.
    ///
    /// # Errors
    /// Returns the locations of further images of the last dump on its disk.
    pub async fn checkpoint_images(&self, container: &str) -> Result<CheckpointImagesResponse, AgentError> {
        call!(self.checkpoint_images(container_request(container)), Some(DUMP))
    }

    /// Copies the memory of a running container onto a disk, for the dump that comes next.
    ///
    /// # Errors
    /// The codes that `agent.proto` lists for this call.
    pub async fn pre_dump_container(&self, request: CheckpointContainerRequest) -> Result<(), AgentError> {
        call!(self.pre_dump_container(request), Some(DUMP)).map(nothing)
    }

    /// Resolves when the disk that a container was restored from is no longer needed. There is no deadline.
    ///
    /// # Errors
    /// Memory of the container could not be read, and the container was killed.
    pub async fn wait_pages(&self, container: &str) -> Result<(), AgentError> {
        call!(self.wait_pages(container_request(container)), None).map(nothing)
    }

    /// Syncs file systems and powers the VM off. Callers should use [`crate::Vm::shutdown`], which also
    /// waits.
    ///
    /// # Errors
    /// The answer may be lost when the VM ends: [`AgentError::Closed`].
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        call!(self.shutdown(Empty::default()), Some(QUICK)).map(nothing)
    }
}

fn nothing(_: Empty) {}

fn container_request(container: &str) -> ContainerRequest {
    ContainerRequest { container_id: container.to_owned(), ..ContainerRequest::default() }
}

fn process_request(container: &str, process: &ProcessRef) -> ProcessRequest {
    ProcessRequest {
        container_id: container.to_owned(),
        exec_id: process.to_wire(),
        ..ProcessRequest::default()
    }
}

async fn finish<T>(
    call: &'static str,
    deadline: Option<Duration>,
    ended: &StreamEnd,
    answer: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, AgentError> {
    let answer = match deadline {
        None => answer.await,
        Some(deadline) => tokio::time::timeout(deadline, answer)
            .await
            .map_err(|_| AgentError::Deadline { call, deadline })?,
    };
    answer.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => {
            // A code that this side does not know is treated as unknown.
            let code = status.code.enum_value().unwrap_or(Code::UNKNOWN);
            AgentError::Refused { code, message: printable(&status.message) }
        }
        ttrpc::Error::Socket(_)
        | ttrpc::Error::Nix(_)
        | ttrpc::Error::LocalClosed
        | ttrpc::Error::RemoteClosed
        | ttrpc::Error::Eof => AgentError::Closed,
        // ttrpc reports some closed connections only as a text.
        ttrpc::Error::Others(_) if ended.is_set() => AgentError::Closed,
        source @ ttrpc::Error::Others(_) => AgentError::Protocol { call, source },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use machinen_protocol::api::{Agent, create_agent};
    use tokio::io::AsyncReadExt as _;
    use ttrpc::r#async::TtrpcContext;

    struct Fake;

    #[async_trait::async_trait]
    impl Agent for Fake {
        async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
            let message = match request.container_id.as_str() {
                "hostile" => format!("\x1b[2J\nlevel=fatal {}", "x".repeat(4_000_000)),
                id => format!("no container {id}"),
            };
            Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, message)))
        }

        async fn delete_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
            Ok(Empty::default())
        }
    }

    async fn connected() -> (Client, ttrpc::r#async::Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let mut server = ttrpc::r#async::Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_agent(Arc::new(Fake)));
        server.start().await.unwrap();
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        (Client::new(Box::new(stream)), server)
    }

    #[tokio::test]
    async fn the_code_and_message_of_the_agent_are_kept() {
        let (client, _server) = connected().await;
        let error = client.start_container("c7", Duration::ZERO).await.unwrap_err();
        assert_eq!(error.to_string(), "guest agent: no container c7");
        assert!(matches!(error, AgentError::Refused { code: Code::NOT_FOUND, .. }));
        assert_eq!(error.kind(), ErrorKind::NotFound);
        client.delete_container("c7").await.unwrap();
    }

    #[tokio::test]
    async fn the_words_of_the_agent_are_printable_and_short() {
        let (client, _server) = connected().await;
        let message = client.start_container("hostile", Duration::ZERO).await.unwrap_err().to_string();
        assert!(message.starts_with("guest agent: \\u{1b}[2J\\nlevel=fatal xxx"), "{message:.80}");
        assert!(message.len() <= machinen_base::text::MAX_SHOWN + "guest agent: ".len());
    }

    #[tokio::test]
    async fn the_end_of_the_vm_ends_every_call() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let client = Client::new(Box::new(ours));
        let (waited, ()) = tokio::join!(client.wait_process("c", &ProcessRef::Init), async {
            // The call has been sent.
            theirs.read_u8().await.unwrap();
            drop(theirs);
        });
        assert!(matches!(waited, Err(AgentError::Closed)), "{waited:?}");
        let after = client.delete_container("c").await;
        assert!(matches!(after, Err(AgentError::Closed)), "{after:?}");
    }
}
