//! Requests to the owner of a pod, which is a shim or a monitor.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use containerd_shim_protos::{
    cgroups_v2::metrics::Metrics,
    ttrpc::{
        self,
        r#async::{Client, transport::Socket},
        context::Context,
    },
};
use machinen::fs::FileError;
use machinen_task::api::{
    ConsoleRequest, ConsoleResponse, DescribeRequest, DescribeResponse, InspectionClient, MetricsRequest,
    NotPausedRequest, ProcessesRequest, ProcessesResponse, SecretsClient, SetSecretsRequest,
};
use protobuf::Message as _;
use rustix::fs::{Mode, OFlags};
use tokio::time::timeout;

use super::{FindError, PATIENCE, PodSocket};

/// For requests that the owner passes on to the guest, which has ten seconds.
const GUEST: Duration = Duration::from_secs(15);

/// A connection with the owner of a pod.
pub(crate) struct PodClient {
    inspection: InspectionClient,
    secrets: SecretsClient,
}

impl PodClient {
    /// # Errors
    /// Nothing listens on the socket.
    pub(crate) fn connect(socket: &PodSocket) -> Result<Self, FindError> {
        let PodSocket(path) = socket;
        let stream = match dial(socket) {
            Ok(stream) => stream,
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused].contains(&error.kind()) =>
            {
                return Err(FindError::NoOwner { path: path.clone() });
            }
            Err(error) => return Err(FileError::new("connect to", path, error).into()),
        };
        stream.set_nonblocking(true).map_err(FileError::at("watch the socket", path))?;
        let stream =
            tokio::net::UnixStream::from_std(stream).map_err(FileError::at("watch the socket", path))?;
        let client = Client::new(Socket::new(stream));
        Ok(Self { inspection: InspectionClient::new(client.clone()), secrets: SecretsClient::new(client) })
    }

    /// The VM and the containers of the pod.
    ///
    /// # Errors
    /// The owner does not answer.
    pub(crate) async fn describe(&self) -> Result<DescribeResponse, FindError> {
        within(PATIENCE, self.inspection.describe(Context::default(), &DescribeRequest::new())).await
    }

    /// The processes of a container, as its guest describes them.
    ///
    /// # Errors
    /// The owner or the guest does not answer, or the container does not run.
    pub(crate) async fn processes(&self, id: &str) -> Result<ProcessesResponse, FindError> {
        let request = ProcessesRequest { container_id: id.to_owned(), ..Default::default() };
        within(GUEST, self.inspection.processes(Context::default(), &request)).await
    }

    /// What a container uses, as the guest counts it.
    ///
    /// # Errors
    /// The owner or the guest does not answer, or the container does not run.
    pub(crate) async fn metrics(&self, id: &str) -> Result<Metrics, FindError> {
        let request = MetricsRequest { container_id: id.to_owned(), ..Default::default() };
        let answer = within(GUEST, self.inspection.metrics(Context::default(), &request)).await?;
        Metrics::parse_from_bytes(&answer.metrics).map_err(FindError::Decode)
    }

    /// Waits until a container is not paused, however long that takes.
    ///
    /// # Errors
    /// The owner does not answer, or ends meanwhile.
    pub(crate) async fn not_paused(&self, id: &str) -> Result<(), FindError> {
        let request = NotPausedRequest { container_id: id.to_owned(), ..Default::default() };
        Ok(self.inspection.not_paused(Context::default(), &request).await.map(drop)?)
    }

    /// Writes and removes secrets of a container.
    ///
    /// # Errors
    /// The owner or the guest does not answer, or refuses.
    pub(crate) async fn set_secrets(&self, request: &SetSecretsRequest) -> Result<(), FindError> {
        within(GUEST, self.secrets.set(Context::default(), request)).await.map(drop)
    }

    /// What the guest of a container has printed on its console after the first `from` bytes.
    ///
    /// # Errors
    /// The owner does not answer, or the pod has no VM.
    pub(crate) async fn console(
        &self,
        id: &str,
        from: u64,
        wait: bool,
    ) -> Result<ConsoleResponse, FindError> {
        let request = ConsoleRequest { container_id: id.to_owned(), from, wait, ..Default::default() };
        let answer = self.inspection.console(Context::default(), &request);
        // A guest may print nothing for days.
        if wait { Ok(answer.await?) } else { within(PATIENCE, answer).await }
    }
}

async fn within<T>(
    time: Duration,
    answer: impl Future<Output = Result<T, ttrpc::Error>>,
) -> Result<T, FindError> {
    match timeout(time, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(FindError::NoAnswer { time }),
    }
}

/// A socket's path may be longer than a Unix address can be.
fn dial(PodSocket(path): &PodSocket) -> io::Result<UnixStream> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir: OwnedFd = rustix::fs::open(dir, flags, Mode::empty())?;
    UnixStream::connect(format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), name.to_string_lossy()))
}
