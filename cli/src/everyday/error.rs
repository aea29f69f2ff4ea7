//! Why an everyday command has failed.

use std::{io, path::PathBuf};

use machinen::{
    config::ConfigError,
    error::{ErrorKind, HasKind},
    fs::FileError,
};

use crate::{find::FindError, oci::OciError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum EverydayError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Oci(#[from] OciError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(
        "{id} was not started by `machinen boot --detach`, so nothing can be attached to it; its manager ({owner}) has its \
         streams"
    )]
    NotAttachable { id: String, owner: &'static str },
    #[error("{id} has ended; `machinen logs` prints its output")]
    Ended { id: String },
    #[error("the connection with the container's streams broke")]
    Attached { source: io::Error },
    #[error(
        "--detach-keys {keys:?} is not understood: it takes characters or ctrl-LETTER, with commas between them"
    )]
    DetachKeys { keys: String },
    #[error(
        "{id} has no log that machinen knows; its output goes to its manager ({owner}), or to the caller that has created it"
    )]
    NoLog { id: String, owner: &'static str },
    #[error("{} has a line that is no line of a container's log", path.display())]
    NotALog { path: PathBuf },
}

impl HasKind for EverydayError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Find(error) => error.kind(),
            Self::Oci(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Config(error) => error.kind(),
            Self::NotAttachable { .. } | Self::NoLog { .. } => ErrorKind::Unimplemented,
            Self::Ended { .. } => ErrorKind::FailedPrecondition,
            Self::Attached { .. } => ErrorKind::Unavailable,
            Self::DetachKeys { .. } => ErrorKind::InvalidArgument,
            Self::NotALog { .. } => ErrorKind::Internal,
        }
    }
}
