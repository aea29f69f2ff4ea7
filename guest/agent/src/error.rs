//! The one map from what went wrong to a ttrpc status.

use std::error::Error;

use nix::errno::Errno;
use ttrpc::{Code, get_status};

use crate::{
    cgroup::CgroupError,
    configure::ConfigureError,
    console,
    container::{ContainerError, TableError},
    criu::CriuError,
    engine::{EngineError, Refusal},
    process::ProcessError,
    view::ViewError,
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
            | ConfigureError::MachineId { .. }
            | ConfigureError::Hostname { .. } => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        };
        Self::new(code, &err)
    }
}

impl From<TableError> for Failure {
    fn from(err: TableError) -> Self {
        Self::new(table_code(&err), &err)
    }
}

impl From<ContainerError> for Failure {
    fn from(err: ContainerError) -> Self {
        let code = match &err {
            ContainerError::NoRootfs
            | ContainerError::IsInit
            | ContainerError::NoLayer
            | ContainerError::Files(_)
            | ContainerError::Stdio(_) => Code::INVALID_ARGUMENT,
            ContainerError::Rootfs(_) | ContainerError::NoStream { .. } => Code::NOT_FOUND,
            ContainerError::Table(err) => table_code(err),
            ContainerError::Engine(err) => engine_code(err),
            ContainerError::Process(err) => process_code(err),
            ContainerError::AlreadyStarted
            | ContainerError::Running
            | ContainerError::NotPaused
            | ContainerError::NotDumped
            | ContainerError::PagesPending
            | ContainerError::HasExecs { .. } => Code::FAILED_PRECONDITION,
            ContainerError::NoCheckpointDisk => Code::INVALID_ARGUMENT,
            ContainerError::Criu(err) => criu_code(err),
            ContainerError::PagesLost(err) => criu_code(err),
            ContainerError::Cgroup(err) => cgroup_code(err),
            ContainerError::View(ViewError::NotRunning) => Code::FAILED_PRECONDITION,
            ContainerError::View(_) | ContainerError::Layer(_) | ContainerError::State { .. } => {
                Code::INTERNAL
            }
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
        Self::new(cgroup_code(&err), &err)
    }
}

fn cgroup_code(err: &CgroupError) -> Code {
    match err {
        CgroupError::NotFrozen => Code::DEADLINE_EXCEEDED,
        CgroupError::FileName { .. } => Code::INVALID_ARGUMENT,
        CgroupError::TooManyNested { .. } | CgroupError::Name { .. } => Code::FAILED_PRECONDITION,
        CgroupError::NoFile { .. } => Code::UNIMPLEMENTED,
        CgroupError::Set { source, .. } => match source.raw_os_error() {
            Some(libc::EINVAL | libc::ERANGE | libc::E2BIG | libc::EOVERFLOW) => Code::INVALID_ARGUMENT,
            Some(libc::ENODEV) => Code::NOT_FOUND,
            _ => Code::INTERNAL,
        },
        _ => Code::INTERNAL,
    }
}

fn criu_code(err: &CriuError) -> Code {
    match err {
        CriuError::Failed { .. }
        | CriuError::Unrestorable { .. }
        | CriuError::Died { .. }
        | CriuError::Harmed { .. }
        | CriuError::Pages { .. } => Code::ABORTED,
        CriuError::Hostname { .. } => Code::INVALID_ARGUMENT,
        CriuError::Limits(err) => cgroup_code(err),
        CriuError::Cpu { .. } | CriuError::Kernel { .. } | CriuError::NoFile { .. } => {
            Code::FAILED_PRECONDITION
        }
        CriuError::Disk(_) | CriuError::Mount { .. } => Code::NOT_FOUND,
        _ => Code::INTERNAL,
    }
}

fn table_code(err: &TableError) -> Code {
    match err {
        TableError::BadId { .. } => Code::INVALID_ARGUMENT,
        TableError::Exists { .. } => Code::ALREADY_EXISTS,
        TableError::Missing { .. } => Code::NOT_FOUND,
        TableError::Busy { .. } => Code::FAILED_PRECONDITION,
    }
}

fn process_code(err: &ProcessError) -> Code {
    match err {
        ProcessError::Finished | ProcessError::Deleted => Code::NOT_FOUND,
        ProcessError::Signal { source: Errno::EINVAL, .. } | ProcessError::StdinEnd { .. } => {
            Code::INVALID_ARGUMENT
        }
        ProcessError::Running | ProcessError::NoTerminal => Code::FAILED_PRECONDITION,
        ProcessError::Signal { .. } | ProcessError::Resize(_) => Code::INTERNAL,
    }
}

fn engine_code(err: &EngineError) -> Code {
    match err {
        EngineError::Spec(_) | EngineError::Refused { refusal: Refusal::Spec, .. } => Code::INVALID_ARGUMENT,
        EngineError::NotRunning => Code::FAILED_PRECONDITION,
        EngineError::Refused { refusal: Refusal::NotFound, .. } => Code::NOT_FOUND,
        EngineError::Refused { refusal: Refusal::NotExecutable, .. } => Code::PERMISSION_DENIED,
        _ => Code::INTERNAL,
    }
}
