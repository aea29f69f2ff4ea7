//! Why a verb of the OCI command line has failed. The texts contain those of runc, which its callers look for.

use std::{io, path::PathBuf};

use containerd_shim_protos::ttrpc;
use machinen::{
    config::ConfigError,
    error::{ErrorKind, HasKind},
    fs::FileError,
    pod::IdError,
    pool::MemberError,
    process::ProcessError,
    spec::bundle::BundleError,
};

use super::state::ContainerStatus;
use crate::find::FindError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum OciError {
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("container does not exist: {id:?}")]
    NoContainer { id: String },
    #[error("container with given ID already exists: {id:?}")]
    Exists { id: String },
    #[error("container not running: {id:?} is {status}")]
    NotRunning { id: String, status: ContainerStatus },
    #[error("container not paused: {id:?} is {status}")]
    NotPaused { id: String, status: ContainerStatus },
    #[error("cannot start an already running container: {id:?}")]
    AlreadyRunning { id: String },
    #[error("cannot start a container that has stopped: {id:?}")]
    HasStopped { id: String },
    #[error("cannot exec in a stopped container: {id:?} is {status}")]
    ExecInStopped { id: String, status: ContainerStatus },
    #[error("cannot exec in a paused container: {id:?} (use --ignore-paused to override)")]
    ExecInPaused { id: String },
    #[error("cannot delete container {id} that is not stopped: {status}")]
    NotStopped { id: String, status: ContainerStatus },
    #[error("{what} is not supported: {reason}")]
    Unsupported { what: &'static str, reason: &'static str },
    #[error(
        "the process gets a terminal, but no console socket is given: pass --console-socket, or do not detach"
    )]
    NoConsoleSocket,
    #[error("a console socket is given, but the process gets no terminal (process.terminal is false)")]
    NoTerminal,
    #[error("unknown signal {signal:?}; it takes a number, or a name such as SIGTERM or TERM")]
    Signal { signal: String },
    #[error("{what} {text:?} is not understood: it takes {takes}")]
    Argument { what: &'static str, text: String, takes: &'static str },
    #[error("either a command or --process is needed")]
    NoCommand,
    #[error("cannot start the process that {purpose}")]
    Spawn { purpose: &'static str, source: ProcessError },
    #[error("cannot {what}")]
    Io { what: &'static str, source: io::Error },
    #[error("cannot read {}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("this process was started without what it is to do")]
    NoParams,
    #[error("cannot read what this process is to do")]
    Params(#[source] serde_json::Error),
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error("cannot encode JSON")]
    Encode(#[source] serde_json::Error),
    #[error("cannot decode the answer of the container's monitor")]
    Decode(#[source] protobuf::Error),
    #[error(transparent)]
    Inspection { source: Box<FindError> },
    #[error("exec failed")]
    Exec(#[source] Box<OciError>),
    #[error("{}", answer(.0))]
    Task(ttrpc::Error),
}

/// The monitor's own message, without the words of the protocol.
fn answer(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message.clone(),
        other => format!("the process that owns the container's VM does not answer: {other}"),
    }
}

impl OciError {
    /// For [`Result::map_err`].
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

impl HasKind for OciError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Id(error) => error.kind(),
            Self::Bundle(error) => error.kind(),
            Self::Config(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Exec(error) => error.kind(),
            Self::Inspection { source } => source.kind(),
            Self::NoContainer { .. } => ErrorKind::NotFound,
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::NotRunning { .. }
            | Self::NotPaused { .. }
            | Self::AlreadyRunning { .. }
            | Self::HasStopped { .. }
            | Self::ExecInStopped { .. }
            | Self::ExecInPaused { .. }
            | Self::NotStopped { .. } => ErrorKind::FailedPrecondition,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::NoConsoleSocket
            | Self::NoTerminal
            | Self::Signal { .. }
            | Self::Argument { .. }
            | Self::NoCommand => ErrorKind::InvalidArgument,
            Self::Io { source, .. } => ErrorKind::of_io(source),
            Self::Task(ttrpc::Error::RpcStatus(status)) => status.code().into(),
            Self::Task(_) => ErrorKind::Unavailable,
            Self::Spawn { .. }
            | Self::NoParams
            | Self::Params(_)
            | Self::Member(_)
            | Self::Json { .. }
            | Self::Encode(_)
            | Self::Decode(_) => ErrorKind::Internal,
        }
    }
}
