//! The errors of a pod's requests.

use std::{io, path::PathBuf, time::Duration};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};
use machinen_protocol::secrets::SecretError;
use machinen_storage::{container_disk::ContainerDiskError, layer::LayerError, rootdisk::RootdiskError};
use machinen_vm::{
    VmError, VmSnapshotError, accel::AccelError, admission::AdmissionError, agent::AgentError,
    assets::MissingAsset, template::TemplateError,
};

use super::{
    ContainerId, ExecId,
    anchor::AnchorError,
    copies::CopyError,
    host_disks::HostDiskError,
    namespaces::NamespaceError,
    receive::ReceiveError,
    rootfs::RootfsPlanError,
    state::{PodRequest, StateError},
    stdio::StdioError,
};
use crate::{
    checkpoint::CheckpointError,
    config::annotations::AnnotationError,
    hooks::HookError,
    host_cgroup::HostCgroupError,
    network::NetworkError,
    shares::ShareError,
    spec::{bundle::BundleError, exec::ProcessSpecError, guest::ReduceError, resources::ResourcesError},
};

/// Why a request to a pod failed.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// No container has this id.
    #[error("container {id} does not exist")]
    NoContainer {
        /// The container's id.
        id: String,
    },
    /// A container has this id already.
    #[error("container {id} already exists")]
    Exists {
        /// The container's id.
        id: String,
    },
    /// The container has no process of this id.
    #[error("container {id} has no process {exec}")]
    NoProcess {
        /// The container's id.
        id: ContainerId,
        /// The process's id.
        exec: ExecId,
    },
    /// The container has a process of this id already.
    #[error("container {id} has a process {exec} already")]
    ExecExists {
        /// The container's id.
        id: ContainerId,
        /// The process's id.
        exec: ExecId,
    },
    /// The container cannot be used before its creation has ended.
    #[error("container {id} is still being created")]
    BeingCreated {
        /// The container's id.
        id: String,
    },
    /// The state of the container or process does not allow the request.
    #[error("cannot {} container {id}", request.verb())]
    State {
        /// The request.
        request: PodRequest,
        /// The container's id.
        id: String,
        /// The cause.
        source: StateError,
    },
    /// A directory of the host cannot be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// A block device of the host cannot be used.
    #[error(transparent)]
    HostDisk(#[from] HostDiskError),
    /// The VM of the container has ended.
    #[error("the VM of container {id} has ended")]
    Gone {
        /// The container's id.
        id: String,
    },
    /// The owner of the pod has ended the pod.
    #[error("container {id} cannot be created: its pod has ended")]
    PodEnded {
        /// The container's id.
        id: String,
    },
    /// The guest's agent refused the request, or cannot be reached.
    #[error("cannot {verb} container {id}")]
    Guest {
        /// What was requested, as a verb.
        verb: &'static str,
        /// The container's id.
        id: String,
        /// The cause.
        source: AgentError,
    },
    /// The guest's agent did not answer in time.
    #[error("cannot {verb} container {id}: the guest did not answer within {deadline:?}")]
    Unanswered {
        /// What was requested, as a verb.
        verb: &'static str,
        /// The container's id.
        id: String,
        /// How long the guest had.
        deadline: Duration,
    },
    /// The container's network cannot be set up or changed.
    #[error(transparent)]
    Network(NetworkError),
    /// An annotation was refused.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The kernel or the image is missing.
    #[error(transparent)]
    Asset(#[from] MissingAsset),
    /// The configuration of the container that stands for a pod cannot be written.
    #[error("cannot make the sandbox of the pod")]
    SandboxBundle(#[source] FileError),
    /// The bundle's `config.json` cannot be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The configuration requires what is not supported.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    /// The description of an added process is not valid.
    #[error(transparent)]
    Process(#[from] ProcessSpecError),
    /// The root file system cannot be used.
    #[error(transparent)]
    Rootfs(#[from] RootfsPlanError),
    /// The standard streams cannot be connected.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A hook of the container failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The host process that stands for the container failed.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The cgroup of the pod on the host cannot be used.
    #[error(transparent)]
    HostCgroup(#[from] HostCgroupError),
    /// The configured accelerator does not work.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The host has too little memory for one more VM.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// A volume cannot be provided.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A secret is not valid.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A request has many secrets.
    #[error("{count} secrets are given at once; {most} are allowed")]
    ManySecrets {
        /// How many there are.
        count: usize,
        /// How many are allowed.
        most: usize,
    },
    /// The new limits are not valid JSON of the runtime-spec.
    #[error("the new limits are not a valid LinuxResources of the runtime-spec")]
    Resources {
        /// The cause.
        source: serde_json::Error,
    },
    /// The new limits are refused.
    #[error(transparent)]
    LayerLimits(#[from] ResourcesError),
    /// The root file system cannot be converted to a disk.
    #[error("cannot convert the rootfs to a disk")]
    Rootdisk(#[source] RootdiskError),
    /// The writable disk cannot be made.
    #[error("cannot prepare the writable layer")]
    Writable(#[from] ContainerDiskError),
    /// The writable disk cannot be used.
    #[error("cannot use the writable layer")]
    Layer(#[source] LayerError),
    /// The container's changes cannot be exported.
    #[error("cannot export what the container has written")]
    Export(#[source] ReceiveError),
    /// The checkpoint cannot be taken.
    #[error("cannot checkpoint container {id}")]
    Checkpoint {
        /// The container's id.
        id: String,
        /// The cause.
        source: CheckpointError,
    },
    /// The checkpoint was taken, but cannot be restored.
    #[error("the checkpoint of container {id} was removed, since its trial restore failed")]
    Verify {
        /// The container's id.
        id: String,
        /// The cause.
        source: Box<PodError>,
    },
    /// The container cannot be restored.
    #[error("cannot restore container {id} from the checkpoint {}", dir.display())]
    Restore {
        /// The container's id.
        id: String,
        /// The directory of the checkpoint.
        dir: PathBuf,
        /// The cause.
        source: CheckpointError,
    },
    /// The VM did not boot.
    #[error("cannot boot the VM")]
    Boot(#[source] VmError),
    /// The VM cannot be cloned from a template.
    #[error("cannot clone a VM")]
    Clone(#[source] VmSnapshotError),
    /// A template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The VM refused a request, or has ended.
    #[error("cannot {what}")]
    Vm {
        /// What was requested, as a verb with its object.
        what: &'static str,
        /// The cause.
        source: VmError,
    },
    /// A file of the host that the container needs cannot be read.
    #[error("cannot read {} for the container", path.display())]
    Injected {
        /// The file on the host.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A disk's descriptor cannot be duplicated.
    #[error("cannot duplicate a disk's descriptor")]
    Descriptor(#[source] io::Error),
    /// The configuration for the guest cannot be encoded.
    #[error("cannot encode the configuration for the guest")]
    Encode(#[source] serde_json::Error),
    /// A namespace of the configuration cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A thread or task ended without a result.
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

    /// Whether the container's network is why the request failed, so that another VM would fail too.
    pub(super) fn is_about_the_network(&self) -> bool {
        matches!(self, Self::Network(_) | Self::Anchor(_))
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
            Self::Process(error) => error.kind(),
            Self::BeingCreated { .. } | Self::PodEnded { .. } => ErrorKind::Unavailable,
            Self::State { source: StateError::Finished, .. } => ErrorKind::NotFound,
            Self::State { .. } => ErrorKind::FailedPrecondition,
            Self::Gone { .. } => ErrorKind::NotFound,
            Self::Unanswered { .. } => ErrorKind::DeadlineExceeded,
            Self::Guest { source, .. } => source.kind(),
            Self::Network(error) => error.kind(),
            Self::Annotation(error) => error.kind(),
            Self::Asset(error) => error.kind(),
            Self::SandboxBundle(_) => ErrorKind::Internal,
            Self::Bundle(error) => error.kind(),
            Self::Reduce(error) => error.kind(),
            Self::Namespace(error) => error.kind(),
            Self::Rootfs(error) => error.kind(),
            Self::Stdio(error) => error.kind(),
            Self::Hook(error) => error.kind(),
            Self::Anchor(_) => ErrorKind::Internal,
            Self::HostCgroup(error) => error.kind(),
            Self::Accel(error) => error.kind(),
            Self::Admission(error) => error.kind(),
            Self::Copy(error) => error.kind(),
            Self::Share(error) => error.kind(),
            Self::HostDisk(error) => error.kind(),
            Self::Resources { .. } | Self::Secret(_) | Self::ManySecrets { .. } => ErrorKind::InvalidArgument,
            Self::LayerLimits(error) => error.kind(),
            Self::Rootdisk(source) => source.kind(),
            Self::Writable(source) => source.kind(),
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
