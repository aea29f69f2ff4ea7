//! What a host asks for in a container's life, in a template, so that nothing of it is done for the first time in a clone.
//!
//! ```text
//!   rehearsal ── calls and streams ──> Host ── socket ── Channel ──> the agent, which serves it as any host
//! ```
//! The agent plays the host, too, over a channel that does not leave the guest. The machine's own host has put two file systems
//! into the places of the template's disks. Containers are made of them as any others, and removed. The disks are not in use any
//! more then, and the kernel keeps nothing of their content: clones have others in their places. Whatever else this leaves, such
//! as the name and the time, each clone is given anew before a user's container is made ([`crate::configure`]).

mod host;

use std::{
    pin::pin,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use machinen_protocol::{
    api::{
        AgentClient, ConfigureNetworkRequest, ConfigureRequest, ContainerRequest, CreateContainerRequest,
        Disk, ExecProcessRequest, ProcessRequest, Rootfs, SignalProcessRequest, Stdio,
        WaitOutOfMemoryRequest, WaitProcessResponse, WatchListenersRequest,
    },
    process::SignalTarget,
};
use protobuf::MessageField;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use ttrpc::{r#async::transport::Socket, context::Context as CallContext};

use self::host::{Host, HostError, HostStream};
use crate::{
    agent::{AgentError, serve},
    channel::{Channel, ChannelError, Unopened},
    console,
    container::ContainerError,
    service::AgentState,
};

const ID: &str = "rehearsal";
const EXEC: &str = "rehearsal-exec";
/// A configuration with what most containers have, among it what ctr(8) gives them. Its program waits.
const SPEC: &str = include_str!("container.json");
/// Bytes with which the generator of random numbers is seeded. Each clone has others.
const ENTROPY: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RehearsalError {
    #[error("cannot rehearse")]
    Host(#[from] HostError),
    #[error("cannot rehearse")]
    Channel(#[from] ChannelError),
    #[error("the rehearsal was not served")]
    Served(#[source] AgentError),
    #[error("a call of the rehearsal has failed")]
    Call(#[from] ttrpc::Error),
    #[error("a program of the rehearsal has written {written} bytes and ended with {status}")]
    Program { status: u32, written: usize },
    #[error("the configuration of the rehearsal is not valid")]
    Spec(#[from] serde_json::Error),
}

/// # Errors
/// The disks have no file systems, or a step fails. Clones only get slower by that.
pub(crate) async fn rehearse(state: &Arc<AgentState>) -> Result<(), RehearsalError> {
    let (host, source) = Host::new()?;
    let channel = Channel::open(Unopened::open(source).await?, &state.context.unclaimed, None);
    let mut served = pin!(serve(&channel, state));
    let lived = tokio::select! {
        biased;
        lived = live(host) => lived,
        ended = &mut served => return Err(ended.err().map_or(HostError::Closed.into(), RehearsalError::Served)),
    };
    // The host has gone, which the agent sees.
    served.await.map_err(RehearsalError::Served)?;
    if let Err(error) = clear(state).await {
        console::report(&error);
    }
    lived
}

/// Removes what a failed step has left.
async fn clear(state: &AgentState) -> Result<(), ContainerError> {
    if let Some((reservation, container)) = state.containers.take(ID)? {
        container.signal(&SignalTarget::All, libc::SIGKILL)?;
        container.init().exited().await;
        container.delete().await?;
        reservation.clear();
    }
    Ok(())
}

/// All that the host asks for.
async fn live(mut host: Host) -> Result<(), RehearsalError> {
    let control = host.accept().await?;
    let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(control)));
    let mut calls = Calls { host, client };
    calls.configure().await?;
    calls.killed().await?;
    calls.ended().await
}

/// What the host calls the agent by.
struct Calls {
    host: Host,
    client: AgentClient,
}

/// The host's ends of a program's streams.
struct Streams {
    _stdin: HostStream,
    stdout: HostStream,
    _stderr: HostStream,
}

fn call() -> CallContext {
    CallContext::default()
}

impl Calls {
    async fn configure(&mut self) -> Result<(), RehearsalError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = ConfigureRequest {
            realtime_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
            entropy: vec![0; ENTROPY],
            hostname: ID.to_owned(),
            machine_id: "0".repeat(32),
            ..Default::default()
        };
        self.client.configure(call(), &request).await?;
        self.client.configure_network(call(), &ConfigureNetworkRequest::default()).await?;
        Ok(())
    }

    /// A container to which a process is added, and that is killed.
    async fn killed(&mut self) -> Result<(), RehearsalError> {
        let _streams = self.create(serde_json::from_str(SPEC)?).await?;
        let (container, init) =
            (container(), ProcessRequest { container_id: ID.to_owned(), ..Default::default() });
        // As the host, which waits from before the start.
        let (client, memory) = (
            self.client.clone(),
            WaitOutOfMemoryRequest { container_id: ID.to_owned(), ..Default::default() },
        );
        let waiting = async {
            tokio::try_join!(client.wait_process(call(), &init), client.wait_out_of_memory(call(), &memory))
                .map_err(RehearsalError::from)
        };
        let working = async {
            let (stream, _reports) = self.host.open().await?;
            self.client
                .watch_listeners(call(), &WatchListenersRequest { stream, ..Default::default() })
                .await?;
            self.client.start_container(call(), &container).await?;
            self.exec().await?;
            let kill = SignalProcessRequest {
                container_id: ID.to_owned(),
                signal: libc::SIGKILL.cast_unsigned(),
                ..Default::default()
            };
            Ok::<_, RehearsalError>(self.client.signal_process(call(), &kill).await?)
        };
        tokio::try_join!(waiting, working)?;
        self.client.delete_container(call(), &container).await?;
        Ok(())
    }

    /// A container that ends by itself, and whose system calls are not filtered.
    async fn ended(&mut self) -> Result<(), RehearsalError> {
        let mut spec: Value = serde_json::from_str(SPEC)?;
        spec["process"]["args"] = version();
        if let Some(linux) = spec["linux"].as_object_mut() {
            linux.remove("seccomp");
        }
        let streams = self.create(spec).await?;
        let init = ProcessRequest { container_id: ID.to_owned(), ..Default::default() };
        let container = container();
        let (client, starting) = (self.client.clone(), self.client.start_container(call(), &container));
        let (ended, _started) = tokio::try_join!(client.wait_process(call(), &init), starting)?;
        streams.check(&ended).await?;
        self.client.delete_container(call(), &container).await?;
        Ok(())
    }

    async fn create(&mut self, spec: Value) -> Result<Streams, RehearsalError> {
        let (stdio, streams) = self.streams().await?;
        let disk = |target| MessageField::some(Disk { target, known: true, ..Default::default() });
        let request = CreateContainerRequest {
            container_id: ID.to_owned(),
            oci_config: serde_json::to_vec(&spec)?,
            rootfs: MessageField::some(Rootfs { base: disk(0), writable: disk(1), ..Default::default() }),
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        self.client.create_container(call(), &request).await?;
        Ok(streams)
    }

    async fn exec(&mut self) -> Result<(), RehearsalError> {
        let (stdio, streams) = self.streams().await?;
        let mut spec: Value = serde_json::from_str(SPEC)?;
        spec["process"]["args"] = version();
        let request = ExecProcessRequest {
            container_id: ID.to_owned(),
            exec_id: EXEC.to_owned(),
            process: serde_json::to_vec(&spec["process"])?,
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        self.client.exec_process(call(), &request).await?;
        let process =
            ProcessRequest { container_id: ID.to_owned(), exec_id: EXEC.to_owned(), ..Default::default() };
        let ended = self.client.wait_process(call(), &process).await?;
        streams.check(&ended).await?;
        self.client.delete_process(call(), &process).await?;
        Ok(())
    }

    async fn streams(&mut self) -> Result<(Stdio, Streams), HostError> {
        let (stdin, input) = self.host.open().await?;
        let (stdout, output) = self.host.open().await?;
        let (stderr, errors) = self.host.open().await?;
        let stdio = Stdio { stdin, stdout, stderr, ..Default::default() };
        Ok((stdio, Streams { _stdin: input, stdout: output, _stderr: errors }))
    }
}

impl Streams {
    /// Reads what the program has written, which is its version.
    async fn check(mut self, ended: &WaitProcessResponse) -> Result<(), RehearsalError> {
        let mut written = vec![0; usize::try_from(ended.stdout_bytes).unwrap_or_default().min(256)];
        let read = self.stdout.read_exact(&mut written).await;
        if ended.exit_status != 0 || written.is_empty() || read.is_err() {
            return Err(RehearsalError::Program { status: ended.exit_status, written: written.len() });
        }
        Ok(())
    }
}

fn container() -> ContainerRequest {
    ContainerRequest { container_id: ID.to_owned(), ..Default::default() }
}

/// The arguments of a program that writes a line and ends.
fn version() -> Value {
    json!(["pause", "-v"])
}
