//! The part of containerd's API that a fork needs. Each call has its namespace and lease, and an error that
//! names what failed.

use std::{
    collections::HashMap,
    error::Error as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_client::{
    Client,
    services::v1::{
        CheckpointTaskRequest, Container, CreateContainerRequest, CreateRequest as CreateLease,
        CreateTaskRequest, DeleteContainerRequest, DeleteRequest as DeleteLease, DeleteTaskRequest,
        GetContainerRequest, GetRequest, KillRequest, PauseTaskRequest, ResumeTaskRequest, StartRequest,
        UpdateContainerRequest, WaitRequest,
        snapshots::{
            Info, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
        },
    },
    tonic::{Request, Response, Status, metadata::AsciiMetadataValue},
    types::{Mount, v1::Process},
};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use prost_types::{Any, FieldMask};
use protobuf::Message;

use super::error::ForkError;

/// If a fork cannot give its lease back, containerd removes the lease after this time, with what only the
/// lease has kept.
const LEASE: Duration = Duration::from_secs(24 * 3600);

/// A connection, which is established again after a restart of containerd.
pub(super) struct ContainerdClient {
    client: Client,
    pub(super) address: PathBuf,
    pub(super) namespace: String,
    namespace_header: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
}

impl ContainerdClient {
    /// # Errors
    /// No process listens at the address.
    pub(super) async fn connect(address: &Path, namespace: &str) -> Result<Self, ForkError> {
        let path = address.strip_prefix("unix:").map_or(address.to_owned(), |path| Path::new("/").join(path));
        let failed = |source| ForkError::Connect { address: path.clone(), source };
        let client = Client::from_path(&path).await.map_err(failed)?;
        let header = namespace.parse::<AsciiMetadataValue>().ok().filter(|header| !header.is_empty());
        let namespace = namespace.to_owned();
        let Some(namespace_header) = header else { return Err(ForkError::Namespace { namespace }) };
        Ok(Self { client, address: path, namespace, namespace_header, lease: None })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert("containerd-namespace", self.namespace_header.clone());
        if let Some(lease) = &self.lease {
            headers.insert("containerd-lease", lease.clone());
        }
        request
    }

    /// Whether containerd serves requests now.
    pub(super) async fn serves(&self) -> bool {
        self.client.version().version(()).await.is_ok()
    }

    /// Takes a lease. It keeps everything that is made from now on from garbage collection, until it is given
    /// back.
    pub(super) async fn take_lease(&mut self, id: &str) -> Result<(), ForkError> {
        let expires = humantime::format_rfc3339_seconds(SystemTime::now() + LEASE).to_string();
        let labels = [("containerd.io/gc.expire".to_owned(), expires)].into();
        let request = self.request(CreateLease { id: id.to_owned(), labels });
        answer("take a lease", self.client.leases().create(request).await)?;
        self.lease = id.parse().ok();
        Ok(())
    }

    /// Returns when the content and snapshots that only the lease has kept are removed.
    pub(super) async fn give_back_lease(&mut self, id: &str) -> Result<(), ForkError> {
        self.lease = None;
        let request = self.request(DeleteLease { id: id.to_owned(), sync: true });
        answer("give back the lease", self.client.leases().delete(request).await)
    }

    pub(super) async fn container(&self, id: &str) -> Result<Container, ForkError> {
        let request = self.request(GetContainerRequest { id: id.to_owned() });
        let got = answer(format!("look up the container {id}"), self.client.containers().get(request).await)?;
        Ok(got.container.unwrap_or_default())
    }

    pub(super) async fn create_container(&self, container: Container) -> Result<(), ForkError> {
        let what = format!("create the container {}", container.id);
        let request = self.request(CreateContainerRequest { container: Some(container) });
        answer(what, self.client.containers().create(request).await).map(drop)
    }

    /// Replaces the configuration of a container.
    pub(super) async fn update_spec(&self, container: Container) -> Result<(), ForkError> {
        let what = format!("update the container {}", container.id);
        let update_mask = Some(FieldMask { paths: vec!["spec".to_owned()] });
        let request = self.request(UpdateContainerRequest { container: Some(container), update_mask });
        answer(what, self.client.containers().update(request).await).map(drop)
    }

    pub(super) async fn delete_container(&self, id: &str) -> Result<(), ForkError> {
        let request = self.request(DeleteContainerRequest { id: id.to_owned() });
        answer(format!("remove the container {id}"), self.client.containers().delete(request).await)
    }

    pub(super) async fn snapshot(&self, snapshotter: &str, key: &str) -> Result<Info, ForkError> {
        let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
        let what = format!("look up the snapshot {key}");
        let request = self.request(StatSnapshotRequest { snapshotter, key });
        Ok(answer(what, self.client.snapshots().stat(request).await)?.info.unwrap_or_default())
    }

    /// How the file system of a snapshot is mounted.
    pub(super) async fn mounts(&self, snapshotter: &str, key: &str) -> Result<Vec<Mount>, ForkError> {
        let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
        let what = format!("find the file system of the snapshot {key}");
        let request = self.request(MountsRequest { snapshotter, key });
        Ok(answer(what, self.client.snapshots().mounts(request).await)?.mounts)
    }

    pub(super) async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, ForkError> {
        let (snapshotter, key, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
        let what = format!("make the snapshot {key}");
        let request = self.request(PrepareSnapshotRequest { snapshotter, key, parent, labels });
        Ok(answer(what, self.client.snapshots().prepare(request).await)?.mounts)
    }

    pub(super) async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), ForkError> {
        let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
        let what = format!("remove the snapshot {key}");
        let request = self.request(RemoveSnapshotRequest { snapshotter, key });
        answer(what, self.client.snapshots().remove(request).await)
    }

    pub(super) async fn task(&self, id: &str) -> Result<Process, ForkError> {
        let request = self.request(GetRequest { container_id: id.to_owned(), ..Default::default() });
        let got = answer(format!("look up the task of {id}"), self.client.tasks().get(request).await)?;
        Ok(got.process.unwrap_or_default())
    }

    pub(super) async fn pause(&self, id: &str) -> Result<(), ForkError> {
        let request = self.request(PauseTaskRequest { container_id: id.to_owned() });
        answer(format!("pause {id}"), self.client.tasks().pause(request).await)
    }

    pub(super) async fn resume(&self, id: &str) -> Result<(), ForkError> {
        let request = self.request(ResumeTaskRequest { container_id: id.to_owned() });
        answer(format!("resume {id}"), self.client.tasks().resume(request).await)
    }

    /// Takes a checkpoint. The options name its directory.
    pub(super) async fn checkpoint(&self, id: &str, options: &CheckpointOptions) -> Result<(), ForkError> {
        let options = Some(any("containerd.runc.v1.CheckpointOptions", options));
        let container_id = id.to_owned();
        let request = self.request(CheckpointTaskRequest { container_id, options, ..Default::default() });
        answer(format!("checkpoint {id}"), self.client.tasks().checkpoint(request).await).map(drop)
    }

    /// Creates a task that is restored from the images in the directory that its options name.
    pub(super) async fn create_task(&self, request: CreateTaskRequest) -> Result<(), ForkError> {
        let what = format!("restore {}", request.container_id);
        let request = self.request(request);
        answer(what, self.client.tasks().create(request).await).map(drop)
    }

    pub(super) async fn start(&self, id: &str) -> Result<u32, ForkError> {
        let request = self.request(StartRequest { container_id: id.to_owned(), ..Default::default() });
        Ok(answer(format!("start {id}"), self.client.tasks().start(request).await)?.pid)
    }

    /// Ends and removes a task in any state.
    pub(super) async fn end_task(&self, id: &str) -> Result<(), ForkError> {
        let container_id = || id.to_owned();
        let what = |what: &str| format!("{what} the task of {id}");
        let kill = KillRequest { container_id: container_id(), signal: 9, all: true, ..Default::default() };
        // The kill fails if the task has ended already. If it fails for another reason, the removal fails
        // too.
        if self.client.tasks().kill(self.request(kill)).await.is_ok() {
            let wait = WaitRequest { container_id: container_id(), ..Default::default() };
            answer(what("wait for"), self.client.tasks().wait(self.request(wait)).await)?;
        }
        let delete = DeleteTaskRequest { container_id: container_id() };
        answer(what("remove"), self.client.tasks().delete(self.request(delete)).await).map(drop)
    }
}

/// An error that containerd has answered has no source; an error of the connection has one.
fn answer<T>(what: impl Into<String>, answer: Result<Response<T>, Status>) -> Result<T, ForkError> {
    let failed = |status: Status| match status.source() {
        Some(_) => ForkError::Lost { what: what.into(), status: Box::new(status) },
        None => ForkError::Call { what: what.into(), status: Box::new(status) },
    };
    answer.map(Response::into_inner).map_err(failed)
}

fn any(type_url: &str, message: &impl Message) -> Any {
    let value = message.write_to_bytes().expect("these messages have no required fields");
    Any { type_url: type_url.to_owned(), value }
}
