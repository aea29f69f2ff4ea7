//! The errors of hooks.

use std::{io, path::PathBuf, time::Duration};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::{ProcessError, ProcessExit},
};

use super::HookStage;

/// Why the hooks of a container could not do their work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// One hook has failed.
    #[error("the {stage} hook {} ({}) failed", number + 1, path.display())]
    Failed {
        /// The list of the hook.
        stage: HookStage,
        /// The place in the list, from 0.
        number: usize,
        /// The program.
        path: PathBuf,
        /// What has happened.
        source: HookFailure,
    },
    /// The container's state cannot be encoded.
    #[error("cannot encode the state of the container for its hooks")]
    Encode(#[source] serde_json::Error),
    /// The record of the poststop hooks cannot be written or read.
    #[error(transparent)]
    Record(#[from] FileError),
    /// The record of the poststop hooks has another content than this version writes.
    #[error("the record {} of poststop hooks is not valid: {problem}", path.display())]
    OddRecord {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Another process runs the poststop hooks.
    #[error("another process runs the poststop hooks that {} lists", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// What has happened to a hook.
#[derive(Debug, thiserror::Error)]
pub enum HookFailure {
    /// The program cannot be started.
    #[error(transparent)]
    Start(ProcessError),
    /// The namespaces of the container cannot be opened.
    #[error(transparent)]
    Namespace(FileError),
    /// The program cannot be given the state, or its output cannot be read.
    #[error("cannot connect its standard streams")]
    Streams(#[source] io::Error),
    /// The program cannot be ended.
    #[error(transparent)]
    End(ProcessError),
    /// The program has ended without success.
    #[error("it {exit}{}", after_colon(.stderr))]
    Exit {
        /// How the program has ended.
        exit: ProcessExit,
        /// The last part of what the program has written to its standard error, fit to be shown.
        stderr: String,
    },
    /// The program was killed.
    #[error("it was killed, because it has not ended within {limit:?}{}", after_colon(.stderr))]
    Timeout {
        /// How long the program had.
        limit: Duration,
        /// The last part of what the program has written to its standard error, fit to be shown.
        stderr: String,
    },
}

fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

impl HasKind for HookError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Failed { source: HookFailure::Timeout { .. }, .. } => ErrorKind::DeadlineExceeded,
            _ => ErrorKind::Internal,
        }
    }
}
