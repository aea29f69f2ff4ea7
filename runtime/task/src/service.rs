//! containerd's task API: each method decodes, calls the pod, and encodes. No logic lives here.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim::oci::ProcessDetails,
    shim_async::Task,
    ttrpc::{self, asynchronous::TtrpcContext},
};
use machinen::pod::{
    CreateRequest, ExecRequest, HostProcess, Pod, PodError, rootfs::RootfsMount, state::ProcessState,
    stdio::StdioNames,
};
use protobuf::MessageField;
use tokio::sync::Notify;

use crate::{
    checkpoint,
    error::{encoding, invalid, to_ttrpc, unimplemented},
    events::{any, timestamp},
    metrics,
};

/// The name of the runtime-spec's limits in containerd's registry of types, after a prefix.
const RESOURCES_TYPE: &str = "opencontainers/runtime-spec/1/LinuxResources";

/// The task API of one pod.
#[derive(Clone)]
pub(crate) struct TaskService {
    pod: Pod,
    ended: Arc<Notify>,
}

impl TaskService {
    /// `ended` is notified when containerd has requested a shutdown and no container is left.
    pub(crate) fn new(pod: Pod, ended: Arc<Notify>) -> Self {
        Self { pod, ended }
    }
}

fn failed(error: PodError) -> ttrpc::Error {
    let answer = to_ttrpc(&error);
    tracing::debug!("answered with an error: {answer}");
    answer
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if !req.parent_checkpoint.is_empty() {
            return unimplemented("a checkpoint with a parent");
        }
        let create = CreateRequest {
            id: req.id.clone(),
            bundle: req.bundle.clone().into(),
            rootfs: req.rootfs.iter().map(rootfs_mount).collect(),
            stdio: StdioNames {
                stdin: req.stdin.clone(),
                stdout: req.stdout.clone(),
                stderr: req.stderr.clone(),
                terminal: req.terminal,
            },
            checkpoint: checkpoint::restored_from(&req)?,
        };
        let pid = self.pod.create(create).await.map_err(failed)?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let started = match req.exec_id.as_str() {
            "" => self.pod.start(&req.id).await,
            exec_id => self.pod.start_exec(&req.id, exec_id).await,
        };
        let pid = started.map_err(failed)?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.pod.container(&req.id).map_err(failed)?;
        let process = container.process(&req.exec_id).map_err(failed)?;
        // A process that was added has no pid until it is started.
        let waits = !req.exec_id.is_empty() && process.state() == ProcessState::Created;
        let mut response = StateResponse {
            id: container.id.clone(),
            exec_id: req.exec_id.clone(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: if waits { 0 } else { container.pid },
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        match process.state() {
            ProcessState::Created => response.set_status(Status::CREATED),
            ProcessState::Running => response.set_status(Status::RUNNING),
            ProcessState::Paused => response.set_status(Status::PAUSED),
            ProcessState::Stopped(exit) => {
                response.set_status(Status::STOPPED);
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at));
            }
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.pod.container(&req.id).map_err(failed)?;
        let exit = container.process(&req.exec_id).map_err(failed)?.exited().await;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        self.pod.kill(&req.id, &req.exec_id, req.signal, req.all).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let deleted = match req.exec_id.as_str() {
            "" => self.pod.delete(&req.id).await,
            exec_id => self.pod.delete_exec(&req.id, exec_id).await,
        };
        let (pid, exit) = deleted.map_err(failed)?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.pod.pids(&req.id).map_err(failed)?;
        let processes = processes.iter().map(process_info).collect::<protobuf::Result<_>>();
        Ok(PidsResponse { processes: processes.map_err(encoding)?, ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        if req.stdin {
            self.pod.close_stdin(&req.id, &req.exec_id).map_err(failed)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Before the container exists, the answer still has the pid of the server, as that of runc's shim.
        let task_pid = self.pod.container(&req.id).map_or(0, |container| container.pid);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.pod.is_empty() {
            self.ended.notify_one();
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let stdio = StdioNames {
            stdin: req.stdin.clone(),
            stdout: req.stdout.clone(),
            stderr: req.stderr.clone(),
            terminal: req.terminal,
        };
        // The Any's type is containerd's name for the OCI process, and its value is JSON.
        let exec = ExecRequest { id: req.exec_id.clone(), process: req.spec.value.clone(), stdio };
        self.pod.exec(&req.id, exec).map_err(failed)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.pod.resize(&req.id, &req.exec_id, req.width, req.height).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        self.pod.pause(&req.id).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        self.pod.resume(&req.id).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let checkpoint = checkpoint::decode(&req)?;
        self.pod.checkpoint(&req.id, checkpoint).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = req.resources.into_option().unwrap_or_default();
        if !resources.type_url.ends_with(RESOURCES_TYPE) {
            return invalid(format!("limits come as {RESOURCES_TYPE}, not as {:?}", resources.type_url));
        }
        self.pod.update(&req.id, &resources.value).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod.stats(&req.id).await.map_err(failed)?;
        let metrics = metrics::encode(&stats, self.pod.config().task.metrics).map_err(encoding)?;
        Ok(StatsResponse { stats: MessageField::some(metrics), ..Default::default() })
    }
}

/// A process in the lists of `ctr task ps` and CRI; only added processes have details.
fn process_info(process: &HostProcess) -> protobuf::Result<ProcessInfo> {
    let details = ProcessDetails { exec_id: process.exec_id.clone(), ..Default::default() };
    let info = if process.exec_id.is_empty() { None } else { Some(any(&details)?) };
    Ok(ProcessInfo { pid: process.pid, info: info.into(), ..Default::default() })
}

fn rootfs_mount(mount: &containerd_shim_protos::api::Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone().into(),
        options: mount.options.clone(),
    }
}
