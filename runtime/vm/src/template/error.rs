//! The errors of templates.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
};

use crate::VmSnapshotError;

/// Why a template could not be made, found or looked after.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is accessible to other users than root, so templates in it cannot be trusted", dir.display())]
    Open { dir: PathBuf },
    #[error("cannot build a template")]
    Vm(#[from] VmSnapshotError),
    #[error("cannot {action} for a template")]
    Memory { action: &'static str, source: io::Error },
    #[error("a template of {needed} MiB does not fit into template.budget_mib = {budget}")]
    Budget { needed: u64, budget: u64 },
    #[error("cannot run the builder of templates")]
    Builder(#[source] ProcessError),
    #[error("the template could not be built: {0}")]
    Failed(String),
    #[error("another process is building this template")]
    Building,
    #[error("cannot describe the template")]
    Encode(#[source] serde_json::Error),
}

impl HasKind for TemplateError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Vm(error) => error.kind(),
            Self::Budget { .. } => ErrorKind::ResourceExhausted,
            Self::Open { .. } => ErrorKind::PermissionDenied,
            Self::Building => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}
