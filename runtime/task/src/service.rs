//! containerd's task API: each method decodes, calls the pod, and encodes. No logic lives here.

use std::{os::fd::OwnedFd, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::Task,
    ttrpc::{self, asynchronous::TtrpcContext},
};
use machinen::{
    pod::{
        ContainerId, CreateRequest, ExecRequest, Pod, PodError, ProcessId, rootfs::RootfsMount,
        state::ProcessState,
    },
    traces::{self, TraceParent},
};
use protobuf::MessageField;
use tokio::sync::Notify;

use crate::{
    checkpoint,
    error::{encoding, invalid, to_ttrpc, unimplemented},
    events::timestamp,
    id, metrics, options, stand_in,
    stdio::{self, NamedStdio},
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

    /// Kills a process when the process of the host that stands for it has ended.
    fn follow(&self, stand_in: Option<OwnedFd>, process: ProcessId) {
        let Some(stand_in) = stand_in else { return };
        let pod = self.pod.clone();
        tokio::spawn(async move {
            if let Err(error) = stand_in::kill_after(stand_in, &pod, &process).await {
                tracing::debug!(id = %process, "not killed after the process that stands for it: {error}");
            }
        });
    }
}

fn failed(error: PodError) -> ttrpc::Error {
    let answer = to_ttrpc(&error);
    tracing::debug!("answered with an error: {answer}");
    answer
}

/// The client's span (W3C trace context), which containerd passes on where it is traced itself.
pub(crate) fn parent(context: &TtrpcContext) -> Option<TraceParent> {
    TraceParent::parse(context.metadata.get("traceparent")?.first()?)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        context: &TtrpcContext,
        req: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        if !req.parent_checkpoint.is_empty() {
            return unimplemented("a checkpoint with a parent");
        }
        let NamedStdio { stdio, stand_in } =
            stdio::decode(&req.stdin, &req.stdout, &req.stderr, req.terminal)?;
        let id = id::container(&req.id)?;
        let options = options::of_request(req.options.as_ref(), &self.pod.config().file)?;
        let create = CreateRequest {
            id: id.clone(),
            bundle: req.bundle.clone().into(),
            rootfs: req.rootfs.iter().map(rootfs_mount).collect(),
            stdio,
            checkpoint: checkpoint::restored_from(&req.checkpoint, options),
        };
        let service = self.clone();
        // A task of its own: a caller that goes away ends this call, but not the creation, and its stand-in ends too.
        let created = tokio::spawn(traces::within(parent(context), async move {
            let pid = service.pod.create(create).await?;
            service.follow(stand_in, id.init());
            Ok(pid)
        }));
        let pid = created.await.map_err(PodError::Worker).flatten().map_err(failed)?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, context: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let process = id::process(&req.id, &req.exec_id)?;
        let started = traces::within(parent(context), self.pod.start(&process));
        let pid = started.await.map_err(failed)?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let id = id::process(&req.id, &req.exec_id)?;
        let container = self.pod.container(&id.container).map_err(failed)?;
        let process = container.process(id.exec.as_ref()).map_err(failed)?;
        // A process that was added has no pid until it is started.
        let waits = id.exec.is_some() && process.state() == ProcessState::Created;
        let mut response = StateResponse {
            exec_id: id::exec_id(&id),
            id: id.container.into(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: if waits { 0 } else { container.pid },
            stdin: stdio::name(process.stdio.stdin.as_ref()),
            stdout: stdio::name(process.stdio.stdout.as_ref()),
            stderr: stdio::name(process.stdio.stderr.as_ref()),
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
        let id = id::process(&req.id, &req.exec_id)?;
        let container = self.pod.container(&id.container).map_err(failed)?;
        let exit = container.process(id.exec.as_ref()).map_err(failed)?.exited().await;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        let scope = id::signal_scope(&req.id, &req.exec_id, req.all)?;
        self.pod.kill(&scope, req.signal).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let deleted = self.pod.delete(&id::process(&req.id, &req.exec_id)?).await;
        let (pid, exit) = deleted.map_err(failed)?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.pod.pids(&id::container(&req.id)?).map_err(failed)?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        if req.stdin {
            self.pod.close_stdin(&id::process(&req.id, &req.exec_id)?).map_err(failed)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Before the container exists, the answer still has the pid of the server, as that of runc's shim.
        let container = ContainerId::parse(&req.id).ok().and_then(|id| self.pod.container(&id).ok());
        let task_pid = container.map_or(0, |container| container.pid);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // A sandbox has a shutdown of its own, also when its containers are gone.
        if self.pod.is_empty() && !self.pod.has_sandbox() {
            self.ended.notify_one();
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let NamedStdio { stdio, stand_in } =
            stdio::decode(&req.stdin, &req.stdout, &req.stderr, req.terminal)?;
        // The Any's type is containerd's name for the OCI process, and its value is JSON.
        let (container, id) = (id::container(&req.id)?, id::exec(&req.exec_id)?);
        let process = container.exec(&id);
        let exec = ExecRequest { container, id, process: req.spec.value.clone(), stdio };
        self.pod.exec(exec).map_err(failed)?;
        self.follow(stand_in, process);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let id = id::process(&req.id, &req.exec_id)?;
        self.pod.resize(&id, req.width, req.height).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        self.pod.pause(&id::container(&req.id)?).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        self.pod.resume(&id::container(&req.id)?).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, context: &TtrpcContext, req: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let checkpoint = checkpoint::decode(&req)?;
        let id = id::container(&req.id)?;
        traces::within(parent(context), self.pod.checkpoint(&id, checkpoint)).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = req.resources.into_option().unwrap_or_default();
        if !resources.type_url.ends_with(RESOURCES_TYPE) {
            return invalid(format!("limits come as {RESOURCES_TYPE}, not as {:?}", resources.type_url));
        }
        self.pod.update(&id::container(&req.id)?, &resources.value).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.pod.stats(&id::container(&req.id)?).await.map_err(failed)?;
        let metrics = metrics::encode(&stats, self.pod.config().task.metrics).map_err(encoding)?;
        Ok(StatsResponse { stats: MessageField::some(metrics), ..Default::default() })
    }
}

fn rootfs_mount(mount: &containerd_shim_protos::api::Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone().into(),
        options: mount.options.clone(),
    }
}
