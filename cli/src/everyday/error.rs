//! Why an everyday command has failed.

use std::{io, path::PathBuf};

use machinen::{
    config::ConfigError,
    error::{ErrorKind, HasKind},
    fs::FileError,
    secrets::SecretError,
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
    #[error("{id} was not started by `machinen boot --detach`, so machinen has not its streams: {instead}")]
    NotAttachable { id: String, instead: String },
    #[error("mux needs a terminal; `machinen attach` does not")]
    NoTerminal,
    #[error("{id} has ended; `machinen logs` prints its output")]
    Ended { id: String },
    #[error("the connection with the container's streams broke")]
    Attached { source: io::Error },
    #[error(
        "--detach-keys {keys:?} is not understood: it takes characters or ctrl-LETTER, with commas between them"
    )]
    DetachKeys { keys: String },
    #[error("{id} has no log that machinen can read: {instead}")]
    NoLog { id: String, instead: String },
    #[error("the ports of {id} are published by its manager, which knows them: {hint}")]
    ForeignPorts { id: String, hint: &'static str },
    #[error("{id} does not publish its port {port}; `machinen port {id}` lists those that it does")]
    NotPublished { id: String, port: String },
    #[error("the port {port:?} is not understood: it takes a number from 1 to 65535, or NUMBER/udp")]
    Port { port: String },
    #[error("the annotation {name} of {id} is not understood")]
    PortAnnotation { id: String, name: &'static str },
    #[error("no secret is given: NAME=VALUE, NAME, --env-file or --rm")]
    NoSecret,
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the variable {name} is not set, from which the secret is to be taken")]
    NoVariable { name: String },
    #[error("line {line} of {} is not NAME=VALUE", path.display())]
    EnvLine { path: PathBuf, line: usize },
    #[error("{} is longer than {most} bytes", path.display())]
    EnvFile { path: PathBuf, most: u64 },
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
            Self::NotAttachable { .. } | Self::NoLog { .. } | Self::ForeignPorts { .. } => {
                ErrorKind::Unimplemented
            }
            Self::Ended { .. } => ErrorKind::FailedPrecondition,
            Self::Attached { .. } => ErrorKind::Unavailable,
            Self::DetachKeys { .. }
            | Self::Port { .. }
            | Self::NoSecret
            | Self::NoTerminal
            | Self::Secret(_)
            | Self::EnvLine { .. }
            | Self::EnvFile { .. } => ErrorKind::InvalidArgument,
            Self::NotPublished { .. } | Self::NoVariable { .. } => ErrorKind::NotFound,
            Self::NotALog { .. } | Self::PortAnnotation { .. } => ErrorKind::Internal,
        }
    }
}
