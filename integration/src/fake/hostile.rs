//! An agent that lies: it answers the host's calls, does none of the work, and breaks one promise.

use std::{
    collections::HashMap,
    future::{pending, poll_fn},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use async_trait::async_trait;
use machinen_protocol::{
    api::{
        Agent, ConfigureRequest, ConfigureResponse, ContainerRequest, CreateContainerRequest,
        CreateContainerResponse, Empty, ExportLayerRequest, ExportLayerResponse, ProcessRequest,
        SetClockRequest, SignalProcessRequest, WaitProcessResponse, create_agent,
    },
    preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble, StreamKind},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
    time::sleep,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
use ttrpc::{Code, r#async::TtrpcContext};

/// The promise that a hostile agent breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hostility {
    /// SIGKILL is answered, and the process never ends.
    IgnoresSigkill,
    /// SIGKILL is refused with this message, and the process never ends.
    RefusesSigkill(&'static str),
    /// After SIGKILL the process has ended, with a large output that arrives byte by byte.
    DripsOutput,
    /// After SIGKILL the process has ended, and its changes arrive byte by byte.
    DripsLayer,
    /// A start fails with this message, repeated so often.
    FailsStart(&'static str, usize),
}

/// Time between two bytes of a slow stream. The host's limits for silence are longer.
const DRIP: Duration = Duration::from_millis(500);

type Raw = Compat<yamux::Stream>;

/// Serves a channel until the host closes it, in a thread of its own.
pub(super) fn serve(channel: OwnedFd, hostility: Hostility) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Err(error) =
            runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(channel, hostility)))
        {
            eprintln!("hostile agent: {error:#}");
        }
    });
}

async fn run(channel: OwnedFd, hostility: Hostility) -> Result<()> {
    let channel = UnixStream::from(channel);
    channel.set_nonblocking(true)?;
    let channel = tokio::net::UnixStream::from_std(channel)?.compat();
    let mut connection = yamux::Connection::new(channel, yamux::Config::default(), yamux::Mode::Server);
    let control = poll_fn(|cx| connection.poll_new_outbound(cx)).await.context("no control stream")?;
    let agent = Arc::new(HostileAgent {
        hostility,
        streams: Mutex::default(),
        stdout: Mutex::default(),
        killed: watch::Sender::new(false),
    });
    let served = tokio::spawn(serve_control(control, Arc::clone(&agent)));
    while let Some(Ok(stream)) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
        tokio::spawn(welcome(stream, Arc::clone(&agent)));
    }
    // Without a connection, the server has no client.
    if served.is_finished() {
        return served.await?;
    }
    served.abort();
    Ok(())
}

async fn serve_control(control: yamux::Stream, agent: Arc<HostileAgent>) -> Result<()> {
    let mut control = control.compat();
    control.write_all(&Preamble { kind: StreamKind::Control, token: 0 }.encode()).await?;
    control.flush().await?;
    let mut answer = [0; ANSWER_LEN];
    control.read_exact(&mut answer).await.context("the host did not greet")?;
    ensure!(Answer::decode(&answer)? == Answer::Accepted, "the host refused the control stream");
    let listener = ttrpc::r#async::transport::Listener::new(futures_util::stream::iter([Ok(control)]));
    let mut server =
        ttrpc::r#async::Server::new().register_service(create_agent(agent)).add_listener(listener);
    server.start().await.context("cannot serve")?;
    // The server ends with the runtime.
    pending().await
}

async fn welcome(stream: yamux::Stream, agent: Arc<HostileAgent>) -> Result<()> {
    let mut stream = stream.compat();
    let mut bytes = [0; PREAMBLE_LEN];
    stream.read_exact(&mut bytes).await?;
    stream.write_all(&Answer::Accepted.encode()).await?;
    stream.flush().await?;
    agent.streams().insert(Preamble::decode(&bytes)?.token, stream);
    Ok(())
}

#[derive(Debug)]
struct HostileAgent {
    hostility: Hostility,
    /// The host's streams by their tokens.
    streams: Mutex<HashMap<u64, Raw>>,
    /// The token of the init's stdout.
    stdout: Mutex<u64>,
    killed: watch::Sender<bool>,
}

impl HostileAgent {
    fn streams(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Raw>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn killed(&self) {
        // The sender lives in self.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Sends a byte now and then on the stream with that token, until the host has had enough.
    fn drip(&self, token: u64) {
        let stream = self.streams().remove(&token);
        tokio::spawn(async move {
            let Some(mut stream) = stream else { return };
            while stream.write_all(b"\0").await.is_ok() && stream.flush().await.is_ok() {
                sleep(DRIP).await;
            }
        });
    }
}

fn refusal(message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, message))
}

#[async_trait]
impl Agent for HostileAgent {
    async fn configure(&self, _: &TtrpcContext, _: ConfigureRequest) -> ttrpc::Result<ConfigureResponse> {
        Ok(ConfigureResponse::default())
    }

    async fn set_clock(&self, _: &TtrpcContext, _: SetClockRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        *self.stdout.lock().unwrap_or_else(PoisonError::into_inner) = request.stdio.stdout;
        Ok(CreateContainerResponse::default())
    }

    async fn start_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        match self.hostility {
            Hostility::FailsStart(message, times) => Err(refusal(message.repeat(times))),
            _ => Ok(Empty::default()),
        }
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        if let Hostility::RefusesSigkill(message) = self.hostility {
            return Err(refusal(message.to_owned()));
        }
        self.killed.send_replace(request.signal == 9);
        Ok(Empty::default())
    }

    async fn wait_process(&self, _: &TtrpcContext, _: ProcessRequest) -> ttrpc::Result<WaitProcessResponse> {
        let ended = WaitProcessResponse { exit_status: 137, ..Default::default() };
        match self.hostility {
            Hostility::DripsOutput => {
                self.killed().await;
                self.drip(*self.stdout.lock().unwrap_or_else(PoisonError::into_inner));
                Ok(WaitProcessResponse { stdout_bytes: u64::MAX, ..ended })
            }
            Hostility::DripsLayer => {
                self.killed().await;
                Ok(ended)
            }
            _ => pending().await,
        }
    }

    async fn export_layer(
        &self,
        _: &TtrpcContext,
        request: ExportLayerRequest,
    ) -> ttrpc::Result<ExportLayerResponse> {
        self.drip(request.stream);
        pending().await
    }

    async fn pause_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }

    async fn delete_container(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}
