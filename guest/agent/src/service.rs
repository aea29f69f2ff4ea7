//! Translates the control calls: decode, call, encode. The modules that they call do the work.

use std::sync::Arc;

use machinen_protocol::{
    api::{self, Agent},
    process::{ProcessRef, SignalTarget},
};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;

use crate::{
    configure,
    container::{Container, ContainerError, IdTable, namespaces},
    context::Context,
    error::Failure,
    network::{Localhost, Nameservers, localhost},
    shares::Shares,
    shutdown,
    stdio::{Streams, WindowSize},
};

/// What the calls of the host work on.
#[derive(Debug)]
pub(crate) struct AgentState {
    pub(crate) context: Context,
    pub(crate) containers: IdTable<Container>,
    /// The volumes of the pod.
    shares: Shares,
    nameservers: Nameservers,
    pub(crate) localhost: Localhost,
    /// Whether the agent may set the clock and the random number generator.
    owns_kernel: bool,
    /// The id of the call that has shut the guest down.
    pub(crate) shutdown: watch::Sender<Option<u32>>,
}

impl AgentState {
    pub(crate) fn new(context: Context, owns_kernel: bool) -> Self {
        let shutdown = watch::Sender::new(None);
        Self {
            context,
            containers: IdTable::new("container"),
            shares: Shares::default(),
            nameservers: Nameservers::default(),
            localhost: Localhost::default(),
            owns_kernel,
            shutdown,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Service {
    state: Arc<AgentState>,
}

impl Service {
    pub(crate) fn new(state: Arc<AgentState>) -> Self {
        Self { state }
    }
}

/// Runs work that must not stop half-way when the host closes the stream or its deadline passes.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    // The release build aborts on a panic, and these tasks are never aborted.
    done.map_err(|err| ttrpc::Error::Others(err.to_string()))?.map_err(Into::into)
}

#[async_trait::async_trait]
impl Agent for Service {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureRequest,
    ) -> ttrpc::Result<api::ConfigureResponse> {
        configure::configure(&request, self.state.owns_kernel).map_err(|err| Failure::from(err).into())
    }

    async fn set_clock(&self, _: &TtrpcContext, request: api::SetClockRequest) -> ttrpc::Result<api::Empty> {
        configure::set_clock(request.realtime_ns, self.state.owns_kernel).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: api::ConfigureNetworkRequest,
    ) -> ttrpc::Result<api::Empty> {
        let Context { network, engine, .. } = &self.state.context;
        // Processes stay in the namespace in which they begin.
        if self.state.containers.is_empty() {
            network.enter_prepared(engine, &request).await.map_err(Failure::from)?;
        }
        network.configure(&request).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn forward_nameservers(
        &self,
        _: &TtrpcContext,
        request: api::ForwardNameserversRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.nameservers.forward(&state.context.unclaimed, &request).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn watch_listeners(
        &self,
        _: &TtrpcContext,
        request: api::WatchListenersRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.localhost.watch(&state.context.unclaimed, &request, state.owns_kernel).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn dial_localhost(
        &self,
        _: &TtrpcContext,
        request: api::DialLocalhostRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            localhost::dial(&state.context.unclaimed, &request).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::CreateContainerResponse> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let reservation = state.containers.reserve(&request.container_id)?;
            let joined = match namespaces::find(&state.containers, &request.namespaces) {
                Ok(joined) => joined,
                Err(err) => {
                    // A refused call leaves no stream behind.
                    let _ =
                        Streams::claim(&request.stdio.unwrap_or_default(), &state.context.unclaimed).await;
                    return Err(err.into());
                }
            };
            let (container, phases) = Container::create(&state.context, request, &joined).await?;
            reservation.fill(container);
            Ok(api::CreateContainerResponse { phases: phases.into_messages(), ..Default::default() })
        })
        .await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.containers.get(&request.container_id)?.start(&state.context).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let wanted = ProcessRef::from_wire(request.exec_id);
        let process = container.process(&wanted).map_err(Failure::from)?;
        let ended = process.ended().await.map_err(Failure::from)?;
        Ok(api::WaitProcessResponse {
            exit_status: ended.code,
            stdout_bytes: ended.stdout_bytes,
            stderr_bytes: ended.stderr_bytes,
            oom_kills: ended.oom_kills,
            layer_unchanged: wanted.is_init() && container.layer_unchanged(),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: api::SignalProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let signal = i32::try_from(request.signal).unwrap_or(i32::MAX);
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let target = SignalTarget::from_wire(request.exec_id, request.all);
        container.signal(&target, signal).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn end_stdin(&self, _: &TtrpcContext, request: api::EndStdinRequest) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let process = container.process(&ProcessRef::from_wire(request.exec_id)).map_err(Failure::from)?;
        process.end_stdin(request.total_bytes).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            if let Some((reservation, container)) = state.containers.take(&request.container_id)? {
                container.delete().await?;
                reservation.clear();
            }
            Ok(api::Empty::new())
        })
        .await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: api::ExecProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let container = state.containers.get(&request.container_id);
            match container {
                Ok(container) => container.exec(&state.context, request).await?,
                Err(err) => {
                    // A refused call leaves no stream behind.
                    let _ =
                        Streams::claim(&request.stdio.unwrap_or_default(), &state.context.unclaimed).await;
                    return Err(err.into());
                }
            }
            Ok(api::Empty::new())
        })
        .await
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        container.delete_process(&ProcessRef::from_wire(request.exec_id)).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: api::ResizeTerminalRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let process = container.process(&ProcessRef::from_wire(request.exec_id)).map_err(Failure::from)?;
        process.resize(WindowSize::clamped(request.width, request.height)).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn export_layer(
        &self,
        _: &TtrpcContext,
        request: api::ExportLayerRequest,
    ) -> ttrpc::Result<api::ExportLayerResponse> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let stream = self.state.context.unclaimed.claim(request.stream).await;
        let stream =
            stream.ok_or(ContainerError::NoStream { token: request.stream }).map_err(Failure::from)?;
        let total_bytes = container.export_layer(stream).await.map_err(Failure::from)?;
        Ok(api::ExportLayerResponse { total_bytes, ..Default::default() })
    }

    async fn open_view(&self, _: &TtrpcContext, request: api::OpenViewRequest) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let stream = state.context.unclaimed.claim(request.stream).await;
            let stream = stream.ok_or(ContainerError::NoStream { token: request.stream })?;
            let Context { engine, reaper, .. } = &state.context;
            let container = state.containers.get(&request.container_id)?;
            container.open_view(engine, reaper, stream, request.without_mounts).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn mount_shares(
        &self,
        _: &TtrpcContext,
        request: api::MountSharesRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.shares.mount(&state.context.unclaimed, &request.streams).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn offer_socket_stream(
        &self,
        _: &TtrpcContext,
        request: api::OfferSocketStreamRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.shares.offer(&state.context.unclaimed, request.stream).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn replace_volume_data(
        &self,
        _: &TtrpcContext,
        request: api::ReplaceVolumeDataRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.shares.replace_data(&request.entry, request.target).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn checkpoint_container(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointContainerRequest,
    ) -> ttrpc::Result<api::CheckpointContainerResponse> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let container = state.containers.get(&request.container_id)?;
            let Context { reaper, disks, .. } = &state.context;
            Ok(container.checkpoint(reaper, disks, request).await?)
        })
        .await
    }

    async fn checkpoint_images(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::CheckpointImagesResponse> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let container = state.containers.get(&request.container_id)?;
            Ok(container.checkpoint_images().await?)
        })
        .await
    }

    async fn pre_dump_container(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            let container = state.containers.get(&request.container_id)?;
            let Context { reaper, disks, .. } = &state.context;
            container.pre_dump(reaper, disks, request).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn wait_pages(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        container.pages_fetched().await.map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.containers.get(&request.container_id)?.pause().await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        container.resume().map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn read_cgroup(
        &self,
        _: &TtrpcContext,
        request: api::ReadCgroupRequest,
    ) -> ttrpc::Result<api::ReadCgroupResponse> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let files = container.cgroup().read_files(&request.names).map_err(Failure::from)?;
        Ok(api::ReadCgroupResponse { files, ..Default::default() })
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::ListProcessesResponse> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        Ok(container.processes().map_err(Failure::from)?)
    }

    async fn set_secrets(
        &self,
        _: &TtrpcContext,
        request: api::SetSecretsRequest,
    ) -> ttrpc::Result<api::Empty> {
        let state = Arc::clone(&self.state);
        whole(async move {
            state.containers.get(&request.container_id)?.set_secrets(request).await?;
            Ok(api::Empty::new())
        })
        .await
    }

    async fn write_cgroup(
        &self,
        _: &TtrpcContext,
        request: api::WriteCgroupRequest,
    ) -> ttrpc::Result<api::Empty> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let cgroup = container.running_cgroup().map_err(Failure::from)?;
        cgroup.write_files(&request.files).map_err(Failure::from)?;
        Ok(api::Empty::new())
    }

    async fn wait_out_of_memory(
        &self,
        _: &TtrpcContext,
        request: api::WaitOutOfMemoryRequest,
    ) -> ttrpc::Result<api::WaitOutOfMemoryResponse> {
        let container = self.state.containers.get(&request.container_id).map_err(Failure::from)?;
        let (killed, ended) = tokio::select! {
            // A kill is reported before the end that it may have caused.
            biased;
            killed = container.cgroup().out_of_memory(request.seen) => (killed.map_err(Failure::from)?, false),
            () = container.init().exited() => (container.cgroup().oom_kills(), true),
        };
        Ok(api::WaitOutOfMemoryResponse { killed, ended, ..Default::default() })
    }

    async fn shutdown(&self, call: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        let (state, call) = (Arc::clone(&self.state), call.mh.stream_id);
        whole(async move {
            shutdown::run(&state.context.reaper, &state.containers).await;
            state.shutdown.send_replace(Some(call));
            Ok(api::Empty::new())
        })
        .await
    }
}
