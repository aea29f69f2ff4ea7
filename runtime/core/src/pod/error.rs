//! The errors of a pod's requests.

use std::{io, path::PathBuf, time::Duration};

use machinen_base::error::{ErrorKind, HasKind};
use machinen_storage::{layer::LayerError, rootdisk::RootdiskError};
use machinen_vm::{
    VmError, VmSnapshotError, accel::AccelError, admission::AdmissionError, agent::AgentError,
    assets::MissingAsset, template::TemplateError,
};

use super::{
    anchor::AnchorError,
    receive::ReceiveError,
    rootfs::RootfsPlanError,
    state::{PodRequest, StateError},
    stdio::StdioError,
};
use crate::{
    checkpoint::CheckpointError,
    config::annotations::AnnotationError,
    spec::{bundle::BundleError, exec::ProcessSpecError, guest::ReduceError, resources::ResourcesError},
};

#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("container {id} does not exist")]
    NoContainer { id: String },
    #[error("container {id} already exists")]
    Exists { id: String },
    #[error("container {id} has no process {exec_id}")]
    NoProcess { id: String, exec_id: String },
    #[error("container {id} has a process {exec_id} already")]
    ExecExists { id: String, exec_id: String },
    #[error("a process that is added to container {id} needs an id")]
    NoExecId { id: String },
    #[error("container {id} is still being created")]
    BeingCreated { id: String },
    #[error("cannot {} container {id}", request.verb())]
    State { request: PodRequest, id: String, source: StateError },
    #[error("the VM of container {id} has ended")]
    Gone { id: String },
    #[error("cannot {verb} container {id}")]
    Guest { verb: &'static str, id: String, source: AgentError },
    #[error("cannot {verb} container {id}: the guest did not answer within {deadline:?}")]
    Unanswered { verb: &'static str, id: String, deadline: Duration },
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error(transparent)]
    Asset(#[from] MissingAsset),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    #[error(transparent)]
    Process(#[from] ProcessSpecError),
    #[error(transparent)]
    Rootfs(#[from] RootfsPlanError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    #[error(transparent)]
    Accel(#[from] AccelError),
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    #[error("the new limits are not a valid LinuxResources of the runtime-spec")]
    Resources { source: serde_json::Error },
    #[error(transparent)]
    LayerLimits(#[from] ResourcesError),
    #[error("cannot convert the rootfs to a disk")]
    Rootdisk(#[source] RootdiskError),
    #[error("cannot prepare the writable layer")]
    Writable(#[from] RootdiskError),
    #[error("cannot use the writable layer")]
    Layer(#[source] LayerError),
    #[error("cannot export what the container has written")]
    Export(#[source] ReceiveError),
    #[error("cannot checkpoint container {id}")]
    Checkpoint { id: String, source: CheckpointError },
    #[error("the checkpoint of container {id} was removed, since its trial restore failed")]
    Verify { id: String, source: Box<PodError> },
    #[error("cannot restore container {id} from the checkpoint {}", dir.display())]
    Restore { id: String, dir: PathBuf, source: CheckpointError },
    #[error("cannot boot the VM")]
    Boot(#[source] VmError),
    #[error("cannot clone a VM")]
    Clone(#[source] VmSnapshotError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("cannot {what}")]
    Vm { what: &'static str, source: VmError },
    #[error("cannot read {} for the container", path.display())]
    Injected { path: PathBuf, source: io::Error },
    #[error("cannot duplicate a disk's descriptor")]
    Descriptor(#[source] io::Error),
    #[error("cannot encode the configuration for the guest")]
    Encode(#[source] serde_json::Error),
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

impl PodError {
    pub(super) fn state(request: PodRequest, id: &str, source: StateError) -> Self {
        Self::State { request, id: id.to_owned(), source }
    }

    pub(crate) fn guest(verb: &'static str, id: &str, source: AgentError) -> Self {
        Self::Guest { verb, id: id.to_owned(), source }
    }

    /// Whether the request failed because the VM, and every process in it, ended.
    pub(super) fn is_loss_of_the_vm(&self) -> bool {
        matches!(
            self,
            Self::Guest { source: AgentError::Closed, .. } | Self::Vm { source: VmError::Exited(_), .. }
        )
    }
}

impl HasKind for PodError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoContainer { .. } | Self::NoProcess { .. } => ErrorKind::NotFound,
            Self::Exists { .. } | Self::ExecExists { .. } => ErrorKind::AlreadyExists,
            Self::NoExecId { .. } => ErrorKind::InvalidArgument,
            Self::Process(error) => error.kind(),
            Self::BeingCreated { .. } => ErrorKind::Unavailable,
            Self::State { source: StateError::Finished, .. } => ErrorKind::NotFound,
            Self::State { .. } => ErrorKind::FailedPrecondition,
            Self::Gone { .. } => ErrorKind::NotFound,
            Self::Unanswered { .. } => ErrorKind::DeadlineExceeded,
            Self::Guest { source, .. } => source.kind(),
            Self::Annotation(error) => error.kind(),
            Self::Asset(error) => error.kind(),
            Self::Bundle(error) => error.kind(),
            Self::Reduce(error) => error.kind(),
            Self::Rootfs(error) => error.kind(),
            Self::Stdio(error) => error.kind(),
            Self::Anchor(_) => ErrorKind::Internal,
            Self::Accel(error) => error.kind(),
            Self::Admission(error) => error.kind(),
            Self::Resources { .. } => ErrorKind::InvalidArgument,
            Self::LayerLimits(error) => error.kind(),
            Self::Rootdisk(source) | Self::Writable(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Export(source) => source.kind(),
            Self::Checkpoint { source, .. } | Self::Restore { source, .. } => source.kind(),
            Self::Verify { source, .. } => source.kind(),
            Self::Boot(source) | Self::Vm { source, .. } => source.kind(),
            Self::Clone(_) | Self::Template(_) => ErrorKind::Internal,
            Self::Injected { .. } | Self::Descriptor(_) | Self::Encode(_) | Self::Worker(_) => {
                ErrorKind::Internal
            }
        }
    }
}
