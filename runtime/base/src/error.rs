//! The meaning of an error for its caller, and its text for users.
//!
//! Each module has its own error enum; [`ErrorKind`] says only how a caller can react. The shim maps it to
//! ttrpc codes and the command line maps it to exit codes, each in one place.

use std::{error::Error, fmt::Write};

/// What an error means for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request, the bundle or the configuration is wrong; an unchanged request will fail again.
    InvalidArgument,
    /// A container, process, file or program that the request names does not exist.
    NotFound,
    AlreadyExists,
    PermissionDenied,
    /// The request is not possible in the container's present state, but may be in an earlier or later one.
    FailedPrecondition,
    /// This version of machinen does not support the request.
    Unimplemented,
    /// Disk, memory or another bounded resource is exhausted.
    ResourceExhausted,
    DeadlineExceeded,
    /// The VM or its agent has ended.
    Unavailable,
    Internal,
}

/// An error that has an [`ErrorKind`].
pub trait HasKind: Error {
    fn kind(&self) -> ErrorKind;
}

/// One line with the error and all its causes, separated by `: `.
///
/// A cause whose text the line already ends with is not repeated.
pub fn chain(error: &(dyn Error + 'static)) -> String {
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
