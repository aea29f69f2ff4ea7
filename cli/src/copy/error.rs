//! Why files cannot be copied.

use std::path::{Path, PathBuf};

use machinen::error::{ErrorKind, HasKind};
use rustix::io::Errno;

use crate::find::FindError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("{id} does not run (it is {status}); the files of a running container can be copied")]
    NotRunning { id: String, status: String },
    #[error("the files of the container are not served: process {pid} has the root of the host")]
    NotServed { pid: u32 },
    #[error("neither SRC nor DST is CONTAINER:PATH")]
    NoContainer,
    #[error("SRC and DST are both in containers; copy to the host first")]
    TwoContainers,
    #[error("the pattern {pattern:?} is not understood")]
    Pattern { pattern: String, source: Box<glob::PatternError> },
    #[error("{} does not exist", path.display())]
    Missing { path: PathBuf },
    #[error("{} is not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("{} has more than {max} symbolic links", path.display())]
    TooManyLinks { path: PathBuf, max: u32 },
    #[error("{} is in the way: it is a {kind}", path.display())]
    InTheWay { path: PathBuf, kind: &'static str },
    #[error("more than {bytes} bytes would be copied; --max-size allows more")]
    TooLarge { bytes: u64 },
    #[error("more than {entries} files would be copied")]
    TooMany { entries: u64 },
    #[error("{} is more than {depth} directories deep", path.display())]
    TooDeep { path: PathBuf, depth: usize },
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
}

impl CopyError {
    /// The failure of `action` on `path`.
    pub(crate) fn at(action: &'static str, path: &Path, errno: Errno) -> Self {
        Self::File { action, path: path.to_owned(), source: errno.into() }
    }
}

impl HasKind for CopyError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Find(error) => error.kind(),
            Self::NotRunning { .. } | Self::NotServed { .. } => ErrorKind::FailedPrecondition,
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::NoContainer
            | Self::TwoContainers
            | Self::Pattern { .. }
            | Self::NotADirectory { .. }
            | Self::TooManyLinks { .. }
            | Self::InTheWay { .. } => ErrorKind::InvalidArgument,
            Self::TooLarge { .. } | Self::TooMany { .. } | Self::TooDeep { .. } => {
                ErrorKind::ResourceExhausted
            }
            Self::File { source, .. } => ErrorKind::of_io(source),
        }
    }
}
