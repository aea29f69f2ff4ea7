//! What the owner of a pod tells the command line: its VM, its containers, their processes, and the guest's console.
//! Each method calls the pod, and encodes.

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::{self, asynchronous::TtrpcContext};
use machinen::{
    config::MetricsFormat,
    pod::{ContainerDescription, ContainerProcessInfo, Pod, state::ProcessState},
};
use protobuf::MessageField;

use crate::{
    api::{
        ConsoleRequest, ConsoleResponse, ContainerInfo, DescribeRequest, DescribeResponse, Inspection,
        MetricsRequest, MetricsResponse, NotPausedRequest, NotPausedResponse, ProcessDescription,
        ProcessesRequest, ProcessesResponse, VmInfo,
    },
    error::{encoding, to_ttrpc},
    id, metrics,
};

/// The service of one pod.
#[derive(Clone)]
pub(crate) struct InspectionService {
    pod: Pod,
}

impl InspectionService {
    pub(crate) fn new(pod: Pod) -> Self {
        Self { pod }
    }
}

#[async_trait]
impl Inspection for InspectionService {
    async fn describe(&self, _: &TtrpcContext, _: DescribeRequest) -> ttrpc::Result<DescribeResponse> {
        let pod = self.pod.describe().await;
        let vm = pod.vm.map(|vm| VmInfo {
            pid: vm.pid,
            memory_mib: vm.memory_mib,
            vcpus: vm.vcpus,
            ..Default::default()
        });
        Ok(DescribeResponse {
            vm: MessageField::from_option(vm),
            containers: pod.containers.into_iter().map(container).collect(),
            namespace: pod.namespace,
            containerd: pod.containerd.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            config: self.pod.config().file.to_string_lossy().into_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn processes(&self, _: &TtrpcContext, req: ProcessesRequest) -> ttrpc::Result<ProcessesResponse> {
        let id = id::container(&req.container_id)?;
        let (processes, total) = self.pod.processes(&id).await.map_err(|error| to_ttrpc(&error))?;
        let processes = processes.into_iter().map(process).collect();
        Ok(ProcessesResponse { processes, total, ..Default::default() })
    }

    async fn metrics(&self, _: &TtrpcContext, req: MetricsRequest) -> ttrpc::Result<MetricsResponse> {
        let id = id::container(&req.container_id)?;
        let stats = self.pod.stats(&id).await.map_err(|error| to_ttrpc(&error))?;
        let metrics = metrics::encode(&stats, MetricsFormat::Cgroup2);
        Ok(MetricsResponse { metrics: metrics.map_err(encoding)?.value, ..Default::default() })
    }

    async fn console(&self, _: &TtrpcContext, req: ConsoleRequest) -> ttrpc::Result<ConsoleResponse> {
        let id = id::container(&req.container_id)?;
        let piece = self.pod.console(&id, req.from, req.wait).await.map_err(|error| to_ttrpc(&error))?;
        Ok(ConsoleResponse {
            text: piece.bytes,
            end: piece.end,
            left_out: piece.left_out,
            ..Default::default()
        })
    }

    async fn not_paused(&self, _: &TtrpcContext, req: NotPausedRequest) -> ttrpc::Result<NotPausedResponse> {
        let container = self.pod.container(&id::container(&req.container_id)?);
        container.map_err(|error| to_ttrpc(&error))?.not_paused().await;
        Ok(NotPausedResponse::default())
    }
}

fn container(described: ContainerDescription) -> ContainerInfo {
    let status = match described.state {
        None => "creating",
        Some(ProcessState::Created) => "created",
        Some(ProcessState::Running) => "running",
        Some(ProcessState::Paused) => "paused",
        Some(ProcessState::Stopped(_)) => "stopped",
    };
    ContainerInfo {
        id: described.id.into(),
        status: status.to_owned(),
        pid: described.pid,
        bundle: described.bundle.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

fn process(info: ContainerProcessInfo) -> ProcessDescription {
    ProcessDescription {
        pid: info.pid,
        parent_pid: info.parent_pid,
        uid: info.uid,
        state: info.state,
        cpu_micros: info.cpu_micros,
        rss_bytes: info.rss_bytes,
        age_micros: info.age_micros,
        threads: info.threads,
        command: info.command,
        ..Default::default()
    }
}
