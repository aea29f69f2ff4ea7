//! Requests to a container's monitor.

use std::io;

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
        PauseRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest,
        StatsRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    shim_async::TaskClient,
    ttrpc::{
        self, Code,
        r#async::{Client, transport::Socket},
        context::Context,
    },
};
use machinen::{fs::FileError, pod::ContainerId};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::net::UnixStream;

use super::{
    error::OciError,
    pod::{PodDir, SOCKET},
    state::{ContainerStatus, StateDir},
};

/// A connection with the monitor of a container.
#[derive(Clone)]
pub(crate) struct MonitorClient {
    id: String,
    task: TaskClient,
}

impl MonitorClient {
    /// Connects to the monitor of a container; None if no monitor runs.
    ///
    /// # Errors
    /// The socket cannot be connected for another reason.
    pub(crate) async fn connect(state: &StateDir) -> Result<Option<Self>, OciError> {
        match state.record()? {
            Some(record) => Self::of_pod(&state.id, &record.pod),
            None => Ok(None),
        }
    }

    /// Connects to the monitor of a pod, for the container `id`; None if no monitor runs.
    ///
    /// # Errors
    /// The socket cannot be connected for another reason.
    pub(crate) fn of_pod(id: &ContainerId, pod: &PodDir) -> Result<Option<Self>, OciError> {
        let connected = pod.with_socket(|path| std::os::unix::net::UnixStream::connect(path));
        let stream = match connected {
            Ok(stream) => stream,
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(FileError::new("connect to", pod.path.join(SOCKET), error).into()),
        };
        Self::over(id, stream).map(Some)
    }

    /// Uses a connection that exists.
    ///
    /// # Errors
    /// The socket cannot be watched.
    pub(crate) fn over(id: &ContainerId, stream: std::os::unix::net::UnixStream) -> Result<Self, OciError> {
        let failed = || OciError::io("use the socket of the container's monitor");
        stream.set_nonblocking(true).map_err(failed())?;
        let stream = UnixStream::from_std(stream).map_err(failed())?;
        Ok(Self { id: id.to_string(), task: TaskClient::new(Client::new(Socket::new(stream))) })
    }

    /// Like [`MonitorClient::connect`] for a verb that needs a running monitor.
    ///
    /// # Errors
    /// The container has stopped, as one without a monitor has.
    pub(crate) async fn running(state: &StateDir) -> Result<Self, OciError> {
        let stopped = || OciError::NotRunning { id: state.id.to_string(), status: ContainerStatus::Stopped };
        Self::connect(state).await?.ok_or_else(stopped)
    }

    /// The state of the container's init.
    pub(crate) async fn status(&self) -> Result<ContainerStatus, OciError> {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        let state = match self.task.state(context(), &request).await {
            Ok(state) => state,
            // The creation has not come that far, or has failed a moment ago.
            Err(error) if is(&error, Code::NOT_FOUND) || is(&error, Code::FAILED_PRECONDITION) => {
                return Ok(ContainerStatus::Creating);
            }
            Err(error) => return Err(OciError::Task(error)),
        };
        Ok(match state.status() {
            Status::CREATED => ContainerStatus::Created,
            Status::RUNNING => ContainerStatus::Running,
            Status::PAUSED | Status::PAUSING => ContainerStatus::Paused,
            Status::STOPPED | Status::UNKNOWN => ContainerStatus::Stopped,
        })
    }

    /// Creates the container; returns the pid of its anchor.
    pub(crate) async fn create(&self, request: CreateTaskRequest) -> Result<u32, OciError> {
        let request = CreateTaskRequest { id: self.id.clone(), ..request };
        self.task.create(context(), &request).await.map(|created| created.pid).map_err(OciError::Task)
    }

    /// Starts the init, or the process that was added as `exec`.
    pub(crate) async fn start(&self, exec: &str) -> Result<u32, OciError> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.task.start(context(), &request).await.map(|started| started.pid).map_err(OciError::Task)
    }

    /// Adds a process.
    pub(crate) async fn exec(&self, request: ExecProcessRequest) -> Result<(), OciError> {
        let request = ExecProcessRequest { id: self.id.clone(), ..request };
        self.task.exec(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// Waits until a process has ended; returns its exit status.
    pub(crate) async fn wait(&self, exec: &str) -> Result<u32, OciError> {
        let request = WaitRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.task.wait(context(), &request).await.map(|ended| ended.exit_status).map_err(OciError::Task)
    }

    /// Sends a signal to the container's init, or to all its processes. Until the monitor has learnt of the end of an
    /// init, that is like a zombie's: the signal is accepted, as by kill(2).
    pub(crate) async fn kill_init(&self, signal: u32, all: bool) -> Result<(), OciError> {
        match self.kill("", signal, all).await {
            Err(OciError::Task(error)) if is(&error, Code::NOT_FOUND) => Ok(()),
            sent => sent,
        }
    }

    /// Sends a signal to a process, or to all of the container.
    pub(crate) async fn kill(&self, exec: &str, signal: u32, all: bool) -> Result<(), OciError> {
        let request =
            KillRequest { id: self.id.clone(), exec_id: exec.to_owned(), signal, all, ..Default::default() };
        self.task.kill(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// Removes a process that has ended, or the container with its init. One that is gone already is no error.
    pub(crate) async fn delete(&self, exec: &str) -> Result<(), OciError> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        match self.task.delete(context(), &request).await {
            Err(error) if !is(&error, Code::NOT_FOUND) => Err(OciError::Task(error)),
            _ => Ok(()),
        }
    }

    /// Makes the monitor end if it has no container. The connection may end before the answer.
    pub(crate) async fn shut_down(&self) {
        let request = ShutdownRequest { id: self.id.clone(), ..Default::default() };
        let _ = self.task.shutdown(context(), &request).await;
    }

    /// Sets the size of a process's terminal, in characters.
    pub(crate) async fn resize(&self, exec: &str, width: u16, height: u16) -> Result<(), OciError> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        self.task.resize_pty(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// Freezes the container.
    pub(crate) async fn pause(&self) -> Result<(), OciError> {
        let request = PauseRequest { id: self.id.clone(), ..Default::default() };
        self.task.pause(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// Lets a frozen container continue.
    pub(crate) async fn resume(&self) -> Result<(), OciError> {
        let request = ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.task.resume(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// Changes the container's limits: `resources` is a LinuxResources of the runtime-spec, in JSON.
    pub(crate) async fn update(&self, resources: Vec<u8>) -> Result<(), OciError> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources,
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.task.update(context(), &request).await.map(drop).map_err(OciError::Task)
    }

    /// The container's metrics, as cgroup v2's message.
    pub(crate) async fn stats(
        &self,
    ) -> Result<containerd_shim_protos::cgroups_v2::metrics::Metrics, OciError> {
        let request = StatsRequest { id: self.id.clone(), ..Default::default() };
        let stats = self.task.stats(context(), &request).await.map_err(OciError::Task)?;
        Message::parse_from_bytes(&stats.stats.value).map_err(OciError::Decode)
    }

    /// Writes a checkpoint.
    pub(crate) async fn checkpoint(&self, request: CheckpointTaskRequest) -> Result<(), OciError> {
        let request = CheckpointTaskRequest { id: self.id.clone(), ..request };
        self.task.checkpoint(context(), &request).await.map(drop).map_err(OciError::Task)
    }
}

/// Without a deadline: the monitor bounds its own work.
fn context() -> Context {
    Context::default()
}

fn is(error: &ttrpc::Error, code: Code) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == code)
}

/// The status of a container, from its monitor if one runs.
///
/// # Errors
/// The monitor does not answer.
pub(crate) async fn status_of(state: &StateDir) -> Result<ContainerStatus, OciError> {
    match MonitorClient::connect(state).await? {
        Some(monitor) => monitor.status().await,
        None if state.record()?.is_none() => Ok(ContainerStatus::Creating),
        None => Ok(ContainerStatus::Stopped),
    }
}
