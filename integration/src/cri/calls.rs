//! The calls of CRI, without the asynchrony that the tests do not need.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use containerd_client::tonic::{Code, Response, Status, transport::Channel};
use k8s_cri::v1::{
    self as api, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tokio::runtime::Runtime;

/// kubelet gives up after two minutes.
const DEADLINE: Duration = Duration::from_secs(120);

/// containerd's refusal of a call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call}: {message} ({code:?})")]
pub struct Refusal {
    pub call: &'static str,
    pub code: Code,
    pub message: String,
}

/// A connection to containerd, which is made again after containerd has started again.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// # Errors
    /// Nothing serves on the socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime
            .block_on(containerd_client::connect(socket))
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        Ok(Self { runtime, channel })
    }

    fn wait<T>(
        &self,
        call: &'static str,
        reply: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Refusal> {
        let within = async { tokio::time::timeout(DEADLINE, reply).await };
        match self.runtime.block_on(within) {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => {
                Err(Refusal { call, code: status.code(), message: status.message().to_owned() })
            }
            Err(_) => {
                let message = format!("no reply within {DEADLINE:?}");
                Err(Refusal { call, code: Code::DeadlineExceeded, message })
            }
        }
    }
}

impl Client {
    /// The events of all containers, until `last` accepts one. containerd (2.0 and newer) keeps those of the last five
    /// minutes for its first reader.
    ///
    /// # Errors
    /// containerd refuses the call, or the last event does not come in time.
    pub fn container_events(
        &self,
        mut is_last: impl FnMut(&api::ContainerEventResponse) -> bool,
    ) -> Result<Vec<api::ContainerEventResponse>, Refusal> {
        let mut service = RuntimeServiceClient::new(self.channel.clone());
        self.wait("get_container_events", async {
            let mut stream = service.get_container_events(api::GetEventsRequest {}).await?.into_inner();
            let mut events = Vec::new();
            while let Some(event) = stream.message().await? {
                events.push(event);
                if events.last().is_some_and(&mut is_last) {
                    break;
                }
            }
            Ok(Response::new(events))
        })
    }
}

/// Calls whose client goes away before there is a reply, as a kubelet that is killed.
macro_rules! abandoned_calls {
    ($($name:ident: $call:ident($request:ident) -> $reply:ident;)*) => {
        impl Client {
            $(
                /// Returns the reply, if it has come before `after`.
                ///
                /// # Errors
                /// containerd refuses the call before that.
                pub fn $name(&self, request: api::$request, after: Duration) -> Result<Option<api::$reply>, Refusal> {
                    let mut service = RuntimeServiceClient::new(self.channel.clone());
                    self.wait(stringify!($call), async {
                        match tokio::time::timeout(after, service.$call(request)).await {
                            Ok(reply) => Ok(Response::new(Some(reply?.into_inner()))),
                            Err(_) => Ok(Response::new(None)),
                        }
                    })
                }
            )*
        }
    };
}

abandoned_calls! {
    abandon_run_pod_sandbox: run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    abandon_start_container: start_container(StartContainerRequest) -> StartContainerResponse;
    abandon_stop_pod_sandbox: stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
}

macro_rules! calls {
    ($service:ident: $($name:ident($request:ident) -> $reply:ident;)*) => {
        impl Client {
            $(
                /// # Errors
                /// containerd refuses the call.
                pub fn $name(&self, request: api::$request) -> Result<api::$reply, Refusal> {
                    let mut service = $service::new(self.channel.clone());
                    self.wait(stringify!($name), service.$name(request))
                }
            )*
        }
    };
}

calls! { ImageServiceClient:
    image_status(ImageStatusRequest) -> ImageStatusResponse;
}

calls! { RuntimeServiceClient:
    status(StatusRequest) -> StatusResponse;
    run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
    remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
    pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
    list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
    list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
    create_container(CreateContainerRequest) -> CreateContainerResponse;
    start_container(StartContainerRequest) -> StartContainerResponse;
    stop_container(StopContainerRequest) -> StopContainerResponse;
    remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
    list_containers(ListContainersRequest) -> ListContainersResponse;
    container_status(ContainerStatusRequest) -> ContainerStatusResponse;
    list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
    container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
    list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
    list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
    update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
    reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
    checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
    exec_sync(ExecSyncRequest) -> ExecSyncResponse;
    exec(ExecRequest) -> ExecResponse;
    attach(AttachRequest) -> AttachResponse;
    port_forward(PortForwardRequest) -> PortForwardResponse;
}
