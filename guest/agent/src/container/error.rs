//! The errors of a container's calls.

use std::{io, path::PathBuf, sync::Arc};

use machinen_protocol::error::{ErrorKind, HasKind};

use super::{
    copies::CopyError, copy_up::CopyUpError, files::FilesError, hooks::StartHookError,
    host_disks::HostDiskError, id_table::IdError, read_only_dev::ReadOnlyDevError, refresh::RefreshError,
    rootfs::RootfsError, secrets::SecretsError,
};
use crate::{
    cgroup::CgroupError, criu::CriuError, engine::EngineError, layer::LayerError, process::ProcessError,
    stdio::StdioError, view::ViewError,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    #[error("namespaces of type {kind:?} cannot be joined")]
    NamespaceType { kind: String },
    #[error("no root file system is given")]
    NoRootfs,
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    #[error(transparent)]
    CopyUp(#[from] CopyUpError),
    #[error(transparent)]
    ReadOnlyDev(#[from] ReadOnlyDevError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    HostDisk(#[from] HostDiskError),
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error("{0}")]
    PagesLost(Arc<CriuError>),
    #[error("memory of the container is still being fetched from the checkpoint that it was restored from")]
    PagesPending,
    /// Begins as runc's message.
    #[error(
        "container init was OOM-killed (memory limit too low?): linux.resources.memory.limit is {limit} bytes"
    )]
    MemoryLimit { limit: i64 },
    #[error("the container is not paused")]
    NotPaused,
    #[error("processes were added to the container and still run: {}", .execs.join(", "))]
    HasExecs { execs: Vec<String> },
    #[error("no disk is given for the checkpoint")]
    NoCheckpointDisk,
    #[error("the container was not dumped")]
    NotDumped,
    #[error(transparent)]
    View(#[from] ViewError),
    #[error("cannot export the container's changes")]
    Layer(#[from] LayerError),
    #[error("the container's disk is a snapshot itself, of which no archive is made")]
    NoLayer,
    #[error("no stream with token {token} is waiting for the archive")]
    NoStream { token: u64 },
    #[error("cannot {what} {path}")]
    State { what: &'static str, path: PathBuf, source: io::Error },
    #[error("container has been started already")]
    AlreadyStarted,
    #[error("container is still running")]
    Running,
    #[error("the init is deleted with its container")]
    IsInit,
    #[error(transparent)]
    StartHook(#[from] StartHookError),
    #[error(transparent)]
    Secrets(#[from] SecretsError),
    #[error(transparent)]
    Table(#[from] IdError),
}

impl HasKind for ContainerError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoRootfs
            | Self::NamespaceType { .. }
            | Self::IsInit
            | Self::NoLayer
            | Self::NoCheckpointDisk
            | Self::MemoryLimit { .. }
            | Self::Files(_)
            | Self::Stdio(_) => ErrorKind::InvalidArgument,
            Self::Rootfs(_) | Self::NoStream { .. } => ErrorKind::NotFound,
            Self::AlreadyStarted
            | Self::Running
            | Self::NotPaused
            | Self::NotDumped
            | Self::PagesPending
            | Self::HasExecs { .. } => ErrorKind::FailedPrecondition,
            Self::Copy(err) => err.kind(),
            Self::HostDisk(err) => err.kind(),
            Self::StartHook(err) => err.kind(),
            Self::Secrets(err) => err.kind(),
            Self::Table(err) => err.kind(),
            Self::Engine(err) => err.kind(),
            Self::Process(err) => err.kind(),
            Self::Criu(err) => err.kind(),
            Self::PagesLost(err) => err.kind(),
            Self::Cgroup(err) => err.kind(),
            Self::View(err) => err.kind(),
            Self::Refresh(_)
            | Self::CopyUp(_)
            | Self::ReadOnlyDev(_)
            | Self::Layer(_)
            | Self::State { .. } => ErrorKind::Internal,
        }
    }
}
