//! Why a container cannot be found or asked.

use std::{path::PathBuf, time::Duration};

use containerd_shim_protos::ttrpc;
use machinen::{
    error::{ErrorKind, HasKind},
    fs::FileError,
};

use crate::oci::OciError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FindError {
    #[error("there is no container {name:?}; `machinen ls` lists those of this host")]
    NoContainer { name: String },
    #[error("{name:?} could be several containers ({candidates}); give the whole id, or NAMESPACE/ID")]
    Ambiguous { name: String, candidates: String },
    #[error("the process that owns the VM does not run: nothing listens at {}", path.display())]
    NoOwner { path: PathBuf },
    #[error("the process that owns the VM does not answer within {} s", time.as_secs())]
    NoAnswer { time: Duration },
    #[error(
        "the process that owns the VM was started by an earlier version of machinen, which cannot be asked this; restart \
         the container"
    )]
    OldOwner,
    #[error("{}", status.message)]
    Refused { status: Box<ttrpc::Status> },
    #[error("cannot talk to the process that owns the VM")]
    Protocol(#[source] Box<ttrpc::Error>),
    #[error("the answer of the process that owns the VM cannot be decoded")]
    Decode(#[source] protobuf::Error),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Oci(#[from] OciError),
}

impl From<ttrpc::Error> for FindError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => match status.code() {
                // ttrpc's own answer to a service or a method that is not there.
                ttrpc::Code::UNIMPLEMENTED => Self::OldOwner,
                ttrpc::Code::INVALID_ARGUMENT if status.message.contains("service") => Self::OldOwner,
                _ => Self::Refused { status: Box::new(status) },
            },
            other => Self::Protocol(Box::new(other)),
        }
    }
}

impl HasKind for FindError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoContainer { .. } => ErrorKind::NotFound,
            Self::Ambiguous { .. } => ErrorKind::InvalidArgument,
            Self::NoOwner { .. } | Self::Protocol(_) => ErrorKind::Unavailable,
            Self::NoAnswer { .. } => ErrorKind::DeadlineExceeded,
            Self::OldOwner => ErrorKind::Unimplemented,
            Self::Refused { status } => status.code().into(),
            Self::Decode(_) | Self::File(_) => ErrorKind::Internal,
            Self::Oci(error) => error.kind(),
        }
    }
}
