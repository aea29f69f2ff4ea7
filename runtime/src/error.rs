//! What an error means to whoever asked, and how it is printed.
//!
//! Each module has its own error enum; this one says only what a caller can do about it. The shim maps
//! [`ErrorKind`] to ttrpc codes, the command line maps it to exit codes, each in one place.

use std::{error::Error, fmt::Write};

/// What an error means for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request, the bundle or the configuration is wrong: it will fail again unchanged.
    InvalidArgument,
    /// A container, process, file or program that the request names does not exist.
    NotFound,
    AlreadyExists,
    PermissionDenied,
    /// Not in this state: the same request may succeed later or earlier in a container's life.
    FailedPrecondition,
    /// This version of machinen cannot do it.
    Unimplemented,
    /// Disk, memory or another bounded thing ran out.
    ResourceExhausted,
    DeadlineExceeded,
    /// The VM or its agent is gone.
    Unavailable,
    Internal,
}

/// Errors that know what they mean for a caller.
pub trait Kind: Error {
    fn kind(&self) -> ErrorKind;
}

/// One line with the error and all its causes, `: ` between them.
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
