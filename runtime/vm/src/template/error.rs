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
    /// A file of a template cannot be read, written, locked or removed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another user could replace a template.
    #[error("{} is accessible to other users than root, so templates in it cannot be trusted", dir.display())]
    Open {
        /// Path of the directory of templates.
        dir: PathBuf,
    },
    /// The VM of the template did not boot, or its state cannot be saved.
    #[error("cannot build a template")]
    Vm(#[from] VmSnapshotError),
    /// A descriptor, memory or a thread for a template cannot be had.
    #[error("cannot {action} for a template")]
    Memory {
        /// What failed: a verb that fits the text, such as `read the memory`.
        action: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The template is larger than all templates together may be.
    #[error("a template of {needed} MiB does not fit into template.budget_mib = {budget}")]
    Budget {
        /// What the template takes, MiB.
        needed: u64,
        /// What the configuration allows, MiB (`template.budget_mib`).
        budget: u64,
    },
    /// The process that builds templates cannot be started.
    #[error("cannot run the builder of templates")]
    Builder(#[source] ProcessError),
    /// The process that builds templates reported this failure.
    #[error("the template could not be built: {0}")]
    Failed(String),
    /// The template is being built, so it is not built a second time.
    #[error("another process is building this template")]
    Building,
    /// The manifest or the request cannot be written as JSON.
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
