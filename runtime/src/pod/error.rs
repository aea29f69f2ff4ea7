//! Why a pod did not do what was asked.

use std::{io, path::PathBuf};

use super::{
    anchor::AnchorError, rootfs::RootfsError, state::StateError, stdio::StdioError, vm_spec::VmSpecError,
};
use crate::{
    agent::AgentError,
    annotations::AnnotationError,
    assets::AssetError,
    error::{ErrorKind, Kind},
    rootdisk::RootdiskError,
    spec::{bundle::BundleError, guest::ReduceError},
    vm::VmError,
};

#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("container {id} does not exist")]
    NoContainer { id: String },
    #[error("container {id} already exists")]
    Exists { id: String },
    #[error("container {id} is still being created")]
    BeingCreated { id: String },
    #[error("cannot {verb} container {id}")]
    State { verb: &'static str, id: String, source: StateError },
    #[error("the VM of container {id} is gone")]
    Gone { id: String },
    #[error("cannot {verb} container {id}")]
    Guest { verb: &'static str, id: String, source: AgentError },
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    #[error(transparent)]
    Asset(#[from] AssetError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    #[error(transparent)]
    VmSpec(#[from] VmSpecError),
    #[error("cannot convert the rootfs to a disk")]
    Rootdisk(#[source] RootdiskError),
    #[error("cannot prepare the writable layer")]
    Writable(#[source] RootdiskError),
    #[error("cannot boot the VM")]
    Boot(#[source] VmError),
    #[error("cannot {what}")]
    Vm { what: &'static str, source: VmError },
    #[error("cannot read {} for the container", path.display())]
    Injected { path: PathBuf, source: io::Error },
    #[error("cannot encode the configuration for the guest")]
    Encode(#[source] serde_json::Error),
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

impl PodError {
    pub(super) fn state(verb: &'static str, id: &str, source: StateError) -> Self {
        Self::State { verb, id: id.to_owned(), source }
    }

    pub(super) fn guest(verb: &'static str, id: &str, source: AgentError) -> Self {
        Self::Guest { verb, id: id.to_owned(), source }
    }
}

impl Kind for PodError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoContainer { .. } => ErrorKind::NotFound,
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::BeingCreated { .. } => ErrorKind::Unavailable,
            Self::State { source: StateError::AlreadyStopped, verb: "signal", .. } => ErrorKind::NotFound,
            Self::State { .. } => ErrorKind::FailedPrecondition,
            Self::Gone { .. } => ErrorKind::NotFound,
            Self::Guest { source, .. } => source.kind(),
            Self::Annotation(error) => error.kind(),
            Self::Asset(error) => error.kind(),
            Self::Bundle(error) => error.kind(),
            Self::Reduce(error) => error.kind(),
            Self::Rootfs(error) => error.kind(),
            Self::Stdio(error) => error.kind(),
            Self::Anchor(_) => ErrorKind::Internal,
            Self::VmSpec(error) => error.kind(),
            Self::Rootdisk(source) | Self::Writable(source) => source.kind(),
            Self::Boot(source) | Self::Vm { source, .. } => source.kind(),
            Self::Injected { .. } | Self::Encode(_) | Self::Worker(_) => ErrorKind::Internal,
        }
    }
}
