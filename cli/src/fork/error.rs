//! Why a container cannot be forked.

use std::{io, path::PathBuf};

use containerd_client::tonic::{self, Code, transport};
use machinen::{
    admission::AdmissionError, checkpoint::CheckpointError, layer::LayerError, pod::rootfs::RootfsError,
};

#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error("cannot start")]
    Start(#[source] io::Error),
    #[error("cannot reach containerd at {}", address.display())]
    Connect { address: PathBuf, source: transport::Error },
    #[error("{namespace:?} is no name of a namespace")]
    Namespace { namespace: String },
    #[error("cannot {what}: {}", .status.message())]
    Call { what: String, status: Box<tonic::Status> },
    #[error("there is no container {id:?} in the namespace {namespace:?}")]
    NoContainer { id: String, namespace: String },
    #[error("{id} has the runtime {runtime:?}; containers of io.machinen.v1 can be forked")]
    Runtime { id: String, runtime: String },
    #[error("{id} does not run (it {state}); only what runs can be forked")]
    NotRunning { id: String, state: &'static str },
    #[error("{id} exists already; choose another id")]
    Exists { id: String },
    #[error("{id} has no snapshot that gets what it writes, of which the new container could have a copy")]
    NoSnapshot { id: String },
    #[error("cannot use the root file system of {id}")]
    Rootfs { id: String, source: RootfsError },
    #[error("the configuration of {id} is not understood")]
    Spec { id: String, source: serde_json::Error },
    #[error("{id} shares the hostname of its VM, so the new container cannot have --hostname")]
    Hostname { id: String },
    #[error("{name:?} is no hostname: it has 1 to 64 characters without spaces")]
    BadHostname { name: String },
    #[error(transparent)]
    Memory(#[from] AdmissionError),
    #[error("{} is not empty: --bundle needs a directory of its own", path.display())]
    BundleNotEmpty { path: PathBuf },
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
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
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    /// containerd does not have what it was asked for.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { status, .. } if status.code() == Code::NotFound)
    }
}
