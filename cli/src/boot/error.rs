//! Why a container cannot be booted.

use machinen::{
    config::{ConfigError, copies::InvalidCopy},
    error::{ErrorKind, HasKind},
    fs::FileError,
    pod::IdError,
};

use crate::{image::ImageError, oci::OciError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Oci(#[from] OciError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
    #[error("interrupted by {signal}")]
    Interrupted { signal: &'static str },
    #[error("the image has no command; give one after its name")]
    NoCommand,
    #[error("{option} {text:?} is not understood: it takes {takes}")]
    Option { option: &'static str, text: String, takes: &'static str },
    #[error("--copy-mount is not understood")]
    Copies(#[source] InvalidCopy),
    #[error("the image has no user {user:?} in /etc/passwd")]
    NoUser { user: String },
    #[error("the image has no group {group:?} in /etc/group")]
    NoGroup { group: String },
    #[error("cannot read {file} of the image")]
    UserFile { file: &'static str, source: std::io::Error },
}

impl HasKind for BootError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(error) => error.kind(),
            Self::Id(error) => error.kind(),
            Self::Image(error) => error.kind(),
            Self::Oci(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Worker(_) | Self::Interrupted { .. } => ErrorKind::Internal,
            Self::NoUser { .. } | Self::NoGroup { .. } => ErrorKind::NotFound,
            Self::NoCommand | Self::Option { .. } | Self::Copies(_) => ErrorKind::InvalidArgument,
            Self::UserFile { source, .. } => ErrorKind::of_io(source),
        }
    }
}
