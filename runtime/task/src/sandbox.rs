//! containerd's Sandbox API: the life of a pod whose sandbox is this shim's own (`sandboxer = "shim"` in the configuration
//! of containerd's CRI plugin). The pod's containers come by the Task API.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
        WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    ttrpc::{self, Code, asynchronous::TtrpcContext, get_status},
};
use machinen::{
    pod::{ContainerId, Pod, PodError, SandboxRequest, state::ProcessExit},
    traces,
};
use protobuf::MessageField;
use tokio::sync::{Notify, watch};

use crate::{
    error::{encoding, to_ttrpc},
    events::timestamp,
    id, metrics, pod_config, service,
};

/// The names of CRI's states of a pod, as which containerd reads them.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The sandbox API of one pod.
#[derive(Debug, Clone)]
pub(crate) struct SandboxService {
    pod: Pod,
    ended: Arc<Notify>,
    sandbox: Arc<Mutex<Option<CreatedSandbox>>>,
    /// How the sandbox ended, once it has.
    exit: watch::Sender<Option<ProcessExit>>,
}

#[derive(Debug, Clone)]
struct CreatedSandbox {
    id: ContainerId,
    request: SandboxRequest,
    created_at: SystemTime,
    /// None: not started.
    pid: Option<u32>,
}

fn failed(error: PodError) -> ttrpc::Error {
    to_ttrpc(&error)
}

fn refused<T>(code: Code, text: String) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(code, text)))
}

impl SandboxService {
    /// `ended` is notified when containerd has requested a shutdown of the sandbox.
    pub(crate) fn new(pod: Pod, ended: Arc<Notify>) -> Self {
        Self { pod, ended, sandbox: Arc::default(), exit: watch::Sender::new(None) }
    }

    fn sandbox(&self) -> std::sync::MutexGuard<'_, Option<CreatedSandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox of this pod, which must have the id.
    fn named(&self, id: &str) -> ttrpc::Result<CreatedSandbox> {
        match self.sandbox().as_ref().filter(|sandbox| sandbox.id.as_str() == id) {
            Some(sandbox) => Ok(sandbox.clone()),
            None => refused(Code::NOT_FOUND, format!("sandbox {id} does not exist")),
        }
    }

    /// Starts the sandbox, and follows it to its end.
    async fn start(&self, sandbox: CreatedSandbox) -> Result<u32, PodError> {
        let pid = self.pod.start_sandbox(&sandbox.id, &sandbox.request).await?;
        let container = self.pod.container(&sandbox.id)?;
        let exit = self.exit.clone();
        tokio::spawn(async move { exit.send_replace(Some(container.exited().await)) });
        if let Some(sandbox) = self.sandbox().as_mut() {
            sandbox.pid = Some(pid);
        }
        Ok(pid)
    }

    async fn stop(&self) -> ttrpc::Result<()> {
        self.pod.stop_sandbox().await.map_err(failed)
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let id = id::container(&req.sandbox_id)?;
        let request = pod_config::decode(&req, &self.pod.config().file)?;
        let mut sandbox = self.sandbox();
        if sandbox.is_some() {
            return refused(
                Code::ALREADY_EXISTS,
                format!("this pod has a sandbox, and cannot have {id} too"),
            );
        }
        *sandbox = Some(CreatedSandbox { id, request, created_at: SystemTime::now(), pid: None });
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let sandbox = self.named(&req.sandbox_id)?;
        let (service, created_at) = (self.clone(), sandbox.created_at);
        // A task of its own: a caller that goes away ends this call, but not the start.
        let parent = service::parent(context);
        let started = tokio::spawn(traces::within(parent, async move { service.start(sandbox).await }));
        let pid = started.await.map_err(PodError::Worker).flatten().map_err(failed)?;
        let created_at = MessageField::some(timestamp(created_at));
        Ok(StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        // The names are Go's (image-spec, config.md).
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        (platform.os, platform.architecture) = ("linux".to_owned(), "amd64".to_owned());
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.named(&req.sandbox_id)?;
        self.stop().await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.named(&req.sandbox_id)?;
        let mut ended = self.exit.subscribe();
        // The service holds the sender.
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        let Some(ProcessExit { status, at }) = exit else {
            return refused(Code::UNAVAILABLE, "the shim is ending".to_owned());
        };
        let exited_at = MessageField::some(timestamp(at));
        Ok(WaitSandboxResponse { exit_status: status, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let sandbox = self.named(&req.sandbox_id)?;
        let exit = *self.exit.borrow();
        let is_ready = sandbox.pid.is_some() && exit.is_none();
        let mut status = SandboxStatusResponse {
            sandbox_id: req.sandbox_id,
            pid: sandbox.pid.unwrap_or(0),
            state: if is_ready { READY } else { NOT_READY }.to_owned(),
            created_at: MessageField::some(timestamp(sandbox.created_at)),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        };
        if req.verbose
            && let Some(vm) = self.pod.describe().await.vm
        {
            let rows = [("vmPid", vm.pid), ("vmMemoryMiB", vm.memory_mib), ("vmCPUs", vm.vcpus)];
            status.info = rows.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())).collect();
        }
        Ok(status)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> ttrpc::Result<PingResponse> {
        self.named(&req.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.stop().await?;
        self.ended.notify_one();
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let sandbox = self.named(&req.sandbox_id)?;
        let stats = self.pod.sandbox_stats(&sandbox.id).await.map_err(failed)?;
        let data = metrics::encode(&stats, self.pod.config().task.metrics).map_err(encoding)?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = req.sandbox_id;
        metrics.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metrics.data = MessageField::some(data);
        Ok(response)
    }
}
