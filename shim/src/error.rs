//! The shim's own errors, and the map from the kind of an error to ttrpc's status codes.

use std::{io, path::PathBuf};

use containerd_shim_protos::ttrpc::{self, Code, get_status};
use machinen::{
    config::ConfigError,
    error::{ErrorKind, HasKind, chain},
    pool::MemberError,
};

#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("wrong command line: {problem}")]
    Usage { problem: String },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "log.level {level:?} of the configuration is unknown; it takes error, warn, info, debug or trace"
    )]
    LogLevel { level: String },
    #[error("the listener was not passed; containerd starts this binary with the action `start`")]
    NoListener,
    #[error(
        "the slot of the warm pool or its number was not passed; members of the pool are started by servers"
    )]
    NoSlot,
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error("cannot serve the task API")]
    Serve(#[source] ttrpc::Error),
    #[error("cannot encode the answer")]
    Encode(#[source] protobuf::Error),
    #[error("cannot encode the answer")]
    Json(#[source] serde_json::Error),
}

impl ShimError {
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}

/// The error that containerd receives: the code of its kind, and the text with all causes.
pub fn to_ttrpc(error: &(impl HasKind + 'static)) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code(error.kind()), chain(error)))
}

/// Refuses a request that this version does not support.
pub fn unimplemented<T>(what: &str) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, format!("{what} is not supported yet"))))
}

/// Refuses an invalid request.
pub fn invalid<T>(what: String) -> ttrpc::Result<T> {
    Err(ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, what)))
}

/// Reports an answer that cannot be encoded.
pub fn encoding(error: protobuf::Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, chain(&ShimError::Encode(error))))
}

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::Internal => Code::INTERNAL,
    }
}
