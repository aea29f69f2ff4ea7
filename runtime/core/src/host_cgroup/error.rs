//! The errors of a pod's cgroup on the host.

use std::path::PathBuf;

use libcgroups::common::{AnyManagerError, CreateCgroupSetupError};
use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};

use super::{path::CgroupPathError, scope::ScopeError};

/// Why a pod's processes cannot be in its cgroup, or why it cannot have its limits.
#[derive(Debug, thiserror::Error)]
pub enum HostCgroupError {
    /// `linux.cgroupsPath` is refused.
    #[error(transparent)]
    Path(#[from] CgroupPathError),
    /// The host has no cgroups that can be used.
    #[error("the host's cgroups cannot be used for {path}")]
    Setup {
        /// The cgroup.
        path: String,
        /// The cause.
        source: CreateCgroupSetupError,
    },
    /// The cgroup cannot be created, or the shim cannot enter it.
    #[error("cannot enter the cgroup {path} of the host")]
    Enter {
        /// The cgroup.
        path: String,
        /// The cause.
        source: AnyManagerError,
    },
    /// systemd does not make the scope, or does not limit it.
    #[error("cannot have the cgroup {path} of the host")]
    Scope {
        /// The cgroup.
        path: String,
        /// The cause.
        source: ScopeError,
    },
    /// The cgroup, or one above it, is frozen.
    #[error(
        "container's cgroup unexpectedly frozen: {}; let it continue, or choose another one (linux.cgroupsPath)",
        group.display()
    )]
    Frozen {
        /// The directory of the frozen cgroup.
        group: PathBuf,
    },
    /// The kernel refuses a limit.
    #[error("cannot set the limits of the cgroup {path} of the host")]
    Limit {
        /// The cgroup.
        path: String,
        /// The cause.
        source: AnyManagerError,
    },
    /// Processes are still in the cgroup.
    #[error("the cgroup {} of the host stays, because processes are still in it: {pids:?}", group.display())]
    InUse {
        /// The directory of the cgroup.
        group: PathBuf,
        /// The processes.
        pids: Vec<u32>,
    },
    /// A file of the host's cgroups, or the record of them in the bundle, cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A thread ended without a result.
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

impl HasKind for HostCgroupError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Path(_) => ErrorKind::InvalidArgument,
            Self::Frozen { .. } => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}
