//! Why an image cannot be built.

use std::{path::PathBuf, time::Duration};

use machinen::{
    config::ConfigError,
    error::{ErrorKind, HasKind},
    fs::FileError,
    pod::IdError,
};

use crate::{boot::BootError, copy::CopyError, find::FindError, image::ImageError, oci::OciError};

#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Oci(#[from] OciError),
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
    #[error("line {line} of the build: {what}")]
    Syntax { line: usize, what: String },
    #[error("the build has no steps")]
    NoSteps,
    #[error("the build has more than {most} steps")]
    TooManySteps { most: usize },
    #[error("{} has no Containerfile and no Dockerfile; --file names another one, and --base an image without one", context.display())]
    NoFile { context: PathBuf },
    #[error("{} is longer than {most} bytes", path.display())]
    LongFile { path: PathBuf, most: u64 },
    #[error("{} is there already; an image is written to a new path", path.display())]
    Exists { path: PathBuf },
    #[error("{option} {text:?} is not understood: it takes {takes}")]
    Option { option: &'static str, text: String, takes: &'static str },
    #[error("line {line}: {step} has failed with status {status}")]
    Failed { line: usize, step: String, status: u32 },
    #[error("line {line}: {step}")]
    Step { line: usize, step: String, source: Box<BuildError> },
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("{source_path:?} {what}")]
    Source { source_path: String, what: &'static str },
    #[error("{} tells what is not part of the context, which is not supported: name single files, or remove it", path.display())]
    IgnoreFile { path: PathBuf },
    #[error("the build has not ended within {} (--timeout)", humantime::format_duration(*.limit))]
    Timeout { limit: Duration },
    #[error(
        "what the build has written could not be taken out of its VM; the log of the monitor has the reason"
    )]
    NotExported,
    #[error("the user of the build's container cannot be found: {file} of the image cannot be read")]
    UserFile { file: &'static str, source: Box<CopyError> },
    #[error("cannot make the image's documents")]
    Document(#[source] serde_json::Error),
}

impl HasKind for BuildError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(error) => error.kind(),
            Self::Id(error) => error.kind(),
            Self::Image(error) => error.kind(),
            Self::Boot(error) => error.kind(),
            Self::Oci(error) => error.kind(),
            Self::Find(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Copy(error) => error.kind(),
            Self::Step { source, .. } => source.kind(),
            Self::UserFile { source, .. } => source.kind(),
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::NoFile { .. } => ErrorKind::NotFound,
            Self::Timeout { .. } => ErrorKind::DeadlineExceeded,
            Self::Failed { .. } => ErrorKind::FailedPrecondition,
            Self::Syntax { .. }
            | Self::NoSteps
            | Self::TooManySteps { .. }
            | Self::LongFile { .. }
            | Self::Option { .. }
            | Self::Source { .. }
            | Self::IgnoreFile { .. } => ErrorKind::InvalidArgument,
            Self::Worker(_) | Self::NotExported | Self::Document(_) => ErrorKind::Internal,
        }
    }
}
