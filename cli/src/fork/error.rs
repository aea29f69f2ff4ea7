//! Why a container cannot be forked.

use std::{io, path::PathBuf};

use containerd_client::tonic::{self, Code, transport};
use machinen::{
    admission::AdmissionError,
    checkpoint::CheckpointError,
    config::ports::PORTS,
    error::{ErrorKind, HasKind},
    fs::FileError,
    layer::LayerError,
    pod::rootfs::RootfsPlanError,
    spec::guest::ReduceError,
};
use machinen_task::options::OptionsError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ForkError {
    #[error("cannot start")]
    Start(#[source] io::Error),
    #[error("cannot reach containerd at {}", address.display())]
    Connect { address: PathBuf, source: transport::Error },
    #[error("{namespace:?} is not a valid name of a namespace")]
    Namespace { namespace: String },
    #[error("cannot {what}: {}", .status.message())]
    Call { what: String, status: Box<tonic::Status> },
    #[error("the connection to containerd broke before it answered the request to {what}: {}", .status.message())]
    Lost { what: String, status: Box<tonic::Status> },
    #[error("containerd does not serve requests at {}", address.display())]
    NotServing { address: PathBuf },
    #[error("there is no container {id:?} in the namespace {namespace:?}")]
    NoContainer { id: String, namespace: String },
    #[error("{id} has the runtime {runtime:?}; containers of io.machinen.v1 can be forked")]
    Runtime { id: String, runtime: String },
    #[error("the options of the container's runtime are not understood")]
    Options(#[source] OptionsError),
    #[error("{id} does not run (it {state}); only a running container can be forked")]
    NotRunning { id: String, state: &'static str },
    #[error("{id} exists already; choose another id")]
    Exists { id: String },
    #[error(
        "there is a snapshot {id} already; choose another id, or remove the snapshot with `ctr snapshots rm`"
    )]
    SnapshotExists { id: String },
    #[error("{id} was resumed by another client while its disk was copied; try again")]
    Resumed { id: String },
    #[error(
        "{id} has no snapshot that stores what it writes, so there is nothing to copy for the new container"
    )]
    NoSnapshot { id: String },
    #[error("cannot use the root file system of {id}")]
    Rootfs { id: String, source: RootfsPlanError },
    #[error("the configuration of {id} is not understood")]
    Spec { id: String, source: serde_json::Error },
    #[error("the mounts of {id} are not supported")]
    Mounts { id: String, source: ReduceError },
    #[error(
        "{id} has writable volumes, whose files are not copied ({volumes}): the new container would write to the same \
         files; if both may, add --volumes share"
    )]
    WritableVolumes { id: String, volumes: String },
    #[error("{id} shares the hostname of its VM, so the new container cannot have --hostname")]
    Hostname { id: String },
    #[error("{name:?} is not a valid hostname: it must have 1 to 64 characters without spaces")]
    BadHostname { name: String },
    #[error(
        "{id} has the network namespace {}, and the new container needs another one: give it one by --netns PATH, or \
         --netns none for a loopback interface only", path.display()
    )]
    NeedsNetwork { id: String, path: PathBuf },
    #[error(
        "{id} has the published ports {ports}, which the new container cannot have too: give it others by --publish, or \
         --publish none"
    )]
    NeedsPorts { id: String, ports: String },
    #[error("--publish has {text:?}; it takes none, or ports separated by commas: {PORTS}")]
    Ports { text: String },
    #[error("--netns {} is the network namespace of {id}: the new container needs another one", path.display())]
    SameNetwork { id: String, path: PathBuf },
    #[error("--netns {} is not absolute", path.display())]
    RelativeNetwork { path: PathBuf },
    #[error("cannot use --netns {}", path.display())]
    Network { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Memory(#[from] AdmissionError),
    #[error("{} is not empty: --checkpoint-dir needs a directory of its own", path.display())]
    CheckpointDirNotEmpty { path: PathBuf },
    #[error("another fork keeps its checkpoint in {}: --checkpoint-dir needs a directory of its own", path.display())]
    CheckpointDirInUse { path: PathBuf },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("cannot copy what {id} has written")]
    Layer { id: String, source: LayerError },
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
    #[error("interrupted by {signal}")]
    Interrupted { signal: &'static str },
}

impl ForkError {
    /// containerd does not have what the request names.
    pub(super) fn is_not_found(&self) -> bool {
        self.has_code(Code::NotFound)
    }

    /// containerd already has what the request was to make.
    pub(super) fn is_already_exists(&self) -> bool {
        self.has_code(Code::AlreadyExists)
    }

    /// It is not known whether containerd has carried out the request.
    pub(super) fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// Another client has paused, checkpointed or resumed the source meanwhile. Another attempt may succeed.
    pub(super) fn is_interference(&self) -> bool {
        matches!(self, Self::Resumed { .. } | Self::Layer { source: LayerError::Exchanged { .. }, .. })
    }

    fn has_code(&self, code: Code) -> bool {
        matches!(self, Self::Call { status, .. } if status.code() == code)
    }
}

impl HasKind for ForkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Connect { .. } | Self::Lost { .. } | Self::NotServing { .. } => ErrorKind::Unavailable,
            Self::Namespace { .. }
            | Self::Runtime { .. }
            | Self::Options(_)
            | Self::Hostname { .. }
            | Self::BadHostname { .. }
            | Self::NeedsNetwork { .. }
            | Self::SameNetwork { .. }
            | Self::NeedsPorts { .. }
            | Self::Ports { .. }
            | Self::RelativeNetwork { .. }
            | Self::WritableVolumes { .. }
            | Self::CheckpointDirNotEmpty { .. } => ErrorKind::InvalidArgument,
            Self::Call { status, .. } => kind_of(status.code()),
            Self::NoContainer { .. } => ErrorKind::NotFound,
            Self::NotRunning { .. }
            | Self::Resumed { .. }
            | Self::NoSnapshot { .. }
            | Self::CheckpointDirInUse { .. } => ErrorKind::FailedPrecondition,
            Self::Exists { .. } | Self::SnapshotExists { .. } => ErrorKind::AlreadyExists,
            Self::Rootfs { source, .. } => source.kind(),
            Self::Mounts { source, .. } => source.kind(),
            Self::Network { source, .. } => ErrorKind::of_io(source),
            Self::Memory(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Checkpoint(error) => error.kind(),
            Self::Layer { source, .. } => source.kind(),
            Self::Start(_) | Self::Spec { .. } | Self::Worker(_) | Self::Interrupted { .. } => {
                ErrorKind::Internal
            }
        }
    }
}

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidArgument,
        Code::NotFound => ErrorKind::NotFound,
        Code::AlreadyExists => ErrorKind::AlreadyExists,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::PermissionDenied,
        Code::FailedPrecondition | Code::Aborted => ErrorKind::FailedPrecondition,
        Code::Unimplemented => ErrorKind::Unimplemented,
        Code::ResourceExhausted => ErrorKind::ResourceExhausted,
        Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::Ok | Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
    }
}
