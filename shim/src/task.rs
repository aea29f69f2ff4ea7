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
    shim_async::Task,
    ttrpc::{self, asynchronous::TtrpcContext},
};
use machinen::pod::{Create, Pod, PodError, rootfs::RootfsMount, state::State, stdio::StdioNames};
use protobuf::MessageField;
use tokio::sync::Notify;

use crate::{
    error::{not_found, to_ttrpc, unimplemented},
    events::{Requests, timestamp},
};

/// The task API of one pod.
#[derive(Clone)]
pub struct TaskService {
    pod: Pod,
    requests: Requests,
    ended: Arc<Notify>,
}

impl TaskService {
    /// `ended` is notified when containerd has asked for the end and no container is left.
    pub fn new(pod: Pod, requests: Requests, ended: Arc<Notify>) -> Self {
        Self { pod, requests, ended }
    }
}

/// Processes besides a container's init come with exec.
fn only_init(id: &str, exec_id: &str) -> ttrpc::Result<()> {
    if exec_id.is_empty() { Ok(()) } else { not_found(format!("container {id} has no process {exec_id}")) }
}

fn failed(error: PodError) -> ttrpc::Error {
    let told = to_ttrpc(&error);
    tracing::debug!("answered with an error: {told}");
    told
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return unimplemented("restore from a checkpoint");
        }
        let create = Create {
            id: req.id.clone(),
            bundle: req.bundle.clone().into(),
            rootfs: req.rootfs.iter().map(rootfs_mount).collect(),
            stdio: StdioNames {
                stdin: req.stdin.clone(),
                stdout: req.stdout.clone(),
                stderr: req.stderr.clone(),
                terminal: req.terminal,
            },
        };
        let id = req.id.clone();
        if self.pod.container(&id).is_err() {
            self.requests.lock().expect("no panic while held").insert(id.clone(), req);
        }
        match self.pod.create(create).await {
            Ok(pid) => Ok(CreateTaskResponse { pid, ..Default::default() }),
            Err(error) => {
                if self.pod.container(&id).is_err() {
                    self.requests.lock().expect("no panic while held").remove(&id);
                }
                Err(failed(error))
            }
        }
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        only_init(&req.id, &req.exec_id)?;
        let pid = self.pod.start(&req.id).await.map_err(failed)?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        only_init(&req.id, &req.exec_id)?;
        let container = self.pod.container(&req.id).map_err(failed)?;
        let mut response = StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: container.pid,
            stdin: container.stdio.stdin.clone(),
            stdout: container.stdio.stdout.clone(),
            stderr: container.stdio.stderr.clone(),
            terminal: container.stdio.terminal,
            ..Default::default()
        };
        match container.state() {
            State::Created => response.set_status(Status::CREATED),
            State::Running => response.set_status(Status::RUNNING),
            State::Stopped(exit) => {
                response.set_status(Status::STOPPED);
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at));
            }
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        only_init(&req.id, &req.exec_id)?;
        let exit = self.pod.container(&req.id).map_err(failed)?.exited().await;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        only_init(&req.id, &req.exec_id)?;
        self.pod.kill(&req.id, req.signal, req.all).await.map_err(failed)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        only_init(&req.id, &req.exec_id)?;
        let (pid, exit) = self.pod.delete(&req.id).await.map_err(failed)?;
        let exited_at = MessageField::some(timestamp(exit.at));
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.pod.container(&req.id).map_err(failed)?;
        let process = ProcessInfo { pid: container.pid, ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        only_init(&req.id, &req.exec_id)?;
        if req.stdin {
            self.pod.close_stdin(&req.id).map_err(failed)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Asked before the container is created, it still says who serves; so does runc's shim.
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

    async fn exec(&self, _: &TtrpcContext, _: ExecProcessRequest) -> ttrpc::Result<Empty> {
        unimplemented("exec")
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> ttrpc::Result<Empty> {
        unimplemented("resizing a terminal")
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<Empty> {
        unimplemented("pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<Empty> {
        unimplemented("resume")
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        unimplemented("checkpoint")
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        unimplemented("update")
    }

    async fn stats(&self, _: &TtrpcContext, _: StatsRequest) -> ttrpc::Result<StatsResponse> {
        unimplemented("stats")
    }
}

fn rootfs_mount(mount: &containerd_shim_protos::api::Mount) -> RootfsMount {
    RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone().into(),
        options: mount.options.clone(),
    }
}
