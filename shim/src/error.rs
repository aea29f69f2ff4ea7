//! The shim's own errors.

use std::io;

use containerd_shim_protos::ttrpc;
use machinen::{config::ConfigError, fs::FileError, pool::MemberError, process::ProcessError};
use machinen_task::options::OptionsError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    #[error("wrong command line: {problem}")]
    Usage { problem: String },
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Options(#[from] OptionsError),
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
    #[error("the server of the sandbox {sandbox} does not run; create the pod again")]
    NoSandbox {
        sandbox: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the server")]
    Server(#[source] ProcessError),
    #[error("cannot serve the task API")]
    Serve(#[source] ttrpc::Error),
    #[error("cannot encode the answer")]
    Encode(#[source] protobuf::Error),
    #[error("cannot encode the answer")]
    Json(#[source] serde_json::Error),
}
