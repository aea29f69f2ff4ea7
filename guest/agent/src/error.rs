//! The one map from what went wrong to a ttrpc status.

use std::error::Error;

use nix::errno::Errno;
use ttrpc::{Code, get_status};

use crate::{
    cgroup::CgroupError,
    configure::ConfigureError,
    console,
    container::{ContainerError, TableError},
    engine::{EngineError, Refusal},
    process::ProcessError,
};

/// A failed call, ready to be answered.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    text: String,
}

impl Failure {
    fn new(code: Code, err: &dyn Error) -> Self {
        Self { code, text: console::chain(err) }
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        Self::RpcStatus(get_status(failure.code, failure.text))
    }
}

impl From<ConfigureError> for Failure {
    fn from(err: ConfigureError) -> Self {
        let code = match &err {
            ConfigureError::Entropy { .. }
            | ConfigureError::Time { .. }
            | ConfigureError::Hostname { .. } => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        };
        Self::new(code, &err)
    }
}

impl From<TableError> for Failure {
    fn from(err: TableError) -> Self {
        let code = match &err {
            TableError::BadId { .. } => Code::INVALID_ARGUMENT,
            TableError::Exists { .. } => Code::ALREADY_EXISTS,
            TableError::Missing { .. } => Code::NOT_FOUND,
            TableError::Busy { .. } => Code::FAILED_PRECONDITION,
        };
        Self::new(code, &err)
    }
}

impl From<ContainerError> for Failure {
    fn from(err: ContainerError) -> Self {
        let code = match &err {
            ContainerError::NoRootfs | ContainerError::Files(_) | ContainerError::Stdio(_) => {
                Code::INVALID_ARGUMENT
            }
            ContainerError::Terminal => Code::UNIMPLEMENTED,
            ContainerError::Rootfs(_) | ContainerError::NoProcess { .. } => Code::NOT_FOUND,
            ContainerError::Engine(err) => engine_code(err),
            ContainerError::Process(err) => process_code(err),
            ContainerError::AlreadyStarted | ContainerError::Running => Code::FAILED_PRECONDITION,
            ContainerError::Cgroup(_) | ContainerError::State { .. } => Code::INTERNAL,
        };
        Self::new(code, &err)
    }
}

impl From<ProcessError> for Failure {
    fn from(err: ProcessError) -> Self {
        Self::new(process_code(&err), &err)
    }
}

impl From<CgroupError> for Failure {
    fn from(err: CgroupError) -> Self {
        Self::new(Code::INTERNAL, &err)
    }
}

fn process_code(err: &ProcessError) -> Code {
    match err {
        ProcessError::Finished | ProcessError::Deleted => Code::NOT_FOUND,
        ProcessError::Signal { source: Errno::EINVAL, .. } | ProcessError::StdinEnd { .. } => {
            Code::INVALID_ARGUMENT
        }
        ProcessError::Signal { .. } => Code::INTERNAL,
    }
}

fn engine_code(err: &EngineError) -> Code {
    match err {
        EngineError::Spec(_) | EngineError::Refused { refusal: Refusal::Spec, .. } => Code::INVALID_ARGUMENT,
        EngineError::Refused { refusal: Refusal::NotFound, .. } => Code::NOT_FOUND,
        EngineError::Refused { refusal: Refusal::NotExecutable, .. } => Code::PERMISSION_DENIED,
        _ => Code::INTERNAL,
    }
}
