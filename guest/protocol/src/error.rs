//! What an error means to its caller, and how an error is printed.
//!
//! Each module has its own error enum; [`ErrorKind`] says only what the caller can do about an error. A ttrpc
//! status carries the kind as a code. Both maps between kinds and codes are here, so that the guest agent,
//! its client on the host and the containerd shim agree.

use std::{error::Error, fmt::Write};

use ttrpc::Code;

/// What an error means for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request, the bundle or the configuration is wrong: the same request will fail again.
    InvalidArgument,
    /// A container, process, file or program that the request names does not exist.
    NotFound,
    /// What the request would create exists already.
    AlreadyExists,
    /// The caller, or the user of the process, has no right to do this.
    PermissionDenied,
    /// The request is refused in the present state: it may succeed earlier or later in the life of the
    /// container.
    FailedPrecondition,
    /// This version of machinen cannot do it.
    Unimplemented,
    /// Disk, memory or another bounded resource ran out.
    ResourceExhausted,
    /// The request took too long.
    DeadlineExceeded,
    /// The VM or its agent is gone.
    Unavailable,
    /// Any other failure; the caller cannot repair it.
    Internal,
}

impl ErrorKind {
    /// The name of the kind for programs. It never changes.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid-argument",
            Self::NotFound => "not-found",
            Self::AlreadyExists => "already-exists",
            Self::PermissionDenied => "permission-denied",
            Self::FailedPrecondition => "failed-precondition",
            Self::Unimplemented => "unimplemented",
            Self::ResourceExhausted => "resource-exhausted",
            Self::DeadlineExceeded => "deadline-exceeded",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
        }
    }

    /// Whether the same request may succeed later although the caller changes nothing.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::ResourceExhausted | Self::DeadlineExceeded | Self::Unavailable)
    }

    /// The kind of a failed operation of the system.
    pub fn of_io(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound,
            std::io::ErrorKind::AlreadyExists => Self::AlreadyExists,
            std::io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            std::io::ErrorKind::InvalidInput => Self::InvalidArgument,
            std::io::ErrorKind::StorageFull
            | std::io::ErrorKind::QuotaExceeded
            | std::io::ErrorKind::OutOfMemory => Self::ResourceExhausted,
            std::io::ErrorKind::TimedOut => Self::DeadlineExceeded,
            _ => Self::Internal,
        }
    }
}

/// An error that knows what it means for its caller.
pub trait HasKind: Error {
    /// What the error means for its caller.
    fn kind(&self) -> ErrorKind;
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidArgument => Self::INVALID_ARGUMENT,
            ErrorKind::NotFound => Self::NOT_FOUND,
            ErrorKind::AlreadyExists => Self::ALREADY_EXISTS,
            ErrorKind::PermissionDenied => Self::PERMISSION_DENIED,
            ErrorKind::FailedPrecondition => Self::FAILED_PRECONDITION,
            ErrorKind::Unimplemented => Self::UNIMPLEMENTED,
            ErrorKind::ResourceExhausted => Self::RESOURCE_EXHAUSTED,
            ErrorKind::DeadlineExceeded => Self::DEADLINE_EXCEEDED,
            ErrorKind::Unavailable => Self::UNAVAILABLE,
            ErrorKind::Internal => Self::INTERNAL,
        }
    }
}

impl From<Code> for ErrorKind {
    /// The kind of a failed call. ttrpc has more codes than there are kinds.
    fn from(code: Code) -> Self {
        match code {
            Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => Self::InvalidArgument,
            Code::NOT_FOUND => Self::NotFound,
            Code::ALREADY_EXISTS => Self::AlreadyExists,
            Code::PERMISSION_DENIED | Code::UNAUTHENTICATED => Self::PermissionDenied,
            Code::FAILED_PRECONDITION | Code::ABORTED => Self::FailedPrecondition,
            Code::UNIMPLEMENTED => Self::Unimplemented,
            Code::RESOURCE_EXHAUSTED => Self::ResourceExhausted,
            Code::DEADLINE_EXCEEDED => Self::DeadlineExceeded,
            Code::UNAVAILABLE => Self::Unavailable,
            // OK is not the code of a failed call.
            Code::OK | Code::CANCELLED | Code::UNKNOWN | Code::INTERNAL | Code::DATA_LOSS => Self::Internal,
        }
    }
}

/// Formats an error and all its causes as one line, with `: ` between them.
///
/// Some errors repeat their cause at the end of their own text: a cause with which the line ends already is
/// left out.
pub fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        let text = text.trim();
        if !line.ends_with(text) {
            write!(line, ": {text}").expect("a String takes any text");
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ErrorKind; 10] = [
        ErrorKind::InvalidArgument,
        ErrorKind::NotFound,
        ErrorKind::AlreadyExists,
        ErrorKind::PermissionDenied,
        ErrorKind::FailedPrecondition,
        ErrorKind::Unimplemented,
        ErrorKind::ResourceExhausted,
        ErrorKind::DeadlineExceeded,
        ErrorKind::Unavailable,
        ErrorKind::Internal,
    ];

    #[test]
    fn a_kind_survives_the_way_through_a_status() {
        for kind in KINDS {
            assert_eq!(ErrorKind::from(Code::from(kind)), kind);
        }
        assert_eq!(ErrorKind::from(Code::ABORTED), ErrorKind::FailedPrecondition);
        assert_eq!(ErrorKind::from(Code::UNKNOWN), ErrorKind::Internal);
    }

    #[test]
    fn codes_differ_and_the_state_of_a_container_does_not_change_by_waiting() {
        let codes: std::collections::BTreeSet<_> = KINDS.iter().map(|kind| kind.code()).collect();
        assert_eq!(codes.len(), KINDS.len());
        let retryable: Vec<_> =
            KINDS.iter().filter(|kind| kind.is_retryable()).map(|kind| kind.code()).collect();
        assert_eq!(retryable, ["resource-exhausted", "deadline-exceeded", "unavailable"]);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Step {
        text: &'static str,
        source: Option<Box<Step>>,
    }

    fn steps(texts: &[&'static str]) -> Step {
        let (text, causes) = texts.split_first().unwrap();
        let source = (!causes.is_empty()).then(|| Box::new(steps(causes)));
        Step { text, source }
    }

    #[test]
    fn a_chain_names_each_cause_once() {
        for (texts, line) in [
            (&["cannot start"][..], "cannot start"),
            (&["cannot start", "no disk", "EIO"], "cannot start: no disk: EIO"),
            (&["cannot start: no disk: EIO", "no disk: EIO\n", "EIO"], "cannot start: no disk: EIO"),
            (&["cannot read a", "a"], "cannot read a"),
            (&["a is missing", "a"], "a is missing: a"),
        ] {
            assert_eq!(chain(&steps(texts)), line);
        }
    }
}
