//! The one supervisor of child processes.
//!
//! Every program that machinen starts is described by a [`Spawn`]: what to run, what it inherits, and which
//! privileges it gives up. [`Spawn::start`] returns a [`Child`] that is watched, ended and reaped;
//! [`Spawn::run`] waits for a short-lived tool and keeps a bounded part of what it printed.

mod child;
mod copied;
mod filter;
mod foreign;
mod jail;
mod memory;
mod spawn;
mod tool;
mod twin;
mod user;

use std::{io, os::unix::process::ExitStatusExt as _, process::ExitStatus};

use crate::fs::FileError;

pub use child::{Child, ChildLimits};
pub use copied::{PageRange, copied_pages, copy_ahead};
pub use filter::SystemCalls;
pub use foreign::{await_ends, foreign_end, ignore_children, kill_foreign, watch_end};
pub use jail::{Jail, JailFiles, Namespaces, ResourceLimits, RunAs, probe};
pub use memory::{descendants, is_own_twin, parent_of, tree_pss};
pub use spawn::{Spawn, Stdio, ToolOutput};
pub use tool::{find_program, run};
pub use twin::{Twin, TwinOriginal, add_forker, prepare_for_twins, twins_are_possible};
pub use user::ReservedUser;

/// Why a child process could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program does not exist.
    #[error("{program} not found; {hint}")]
    NotFound {
        /// The name or path that was looked for.
        program: String,
        /// What to do, such as which package to install.
        hint: String,
    },
    /// The program exists and cannot be executed.
    #[error("cannot start {program}")]
    Spawn {
        /// The name or path of the program.
        program: String,
        /// What fork(2), exec(3) or a step between them answered.
        source: io::Error,
    },
    /// The files that the program is to see cannot be put together.
    #[error("cannot start {program}")]
    Root {
        /// The name or path of the program.
        program: String,
        /// Which file it was.
        source: FileError,
    },
    /// A running child cannot be supervised or signalled.
    #[error("cannot {action} {program} (pid {pid})")]
    Child {
        /// What failed: a verb that fits the text, such as `watch`.
        action: &'static str,
        /// The name or path of the program.
        program: String,
        /// The pid of the child on the host.
        pid: u32,
        /// What the system answered.
        source: io::Error,
    },
    /// A tool ended without success.
    #[error("{program} {exit}{}", quoted(.stderr))]
    Failed {
        /// The name or path of the tool.
        program: String,
        /// How the tool ended.
        exit: ProcessExit,
        /// The first 64 KiB that the tool has written to its standard error.
        stderr: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessExit {
    /// The process exited with this status.
    Code(i32),
    /// This signal killed the process.
    Signal(i32),
}

impl ProcessExit {
    /// Whether the process exited with status 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

impl From<ExitStatus> for ProcessExit {
    fn from(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => Self::Signal(signal),
            None => Self::Code(status.code().unwrap_or_default()),
        }
    }
}

impl std::fmt::Display for ProcessExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(known) => write!(f, "was killed by {known}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

/// `: <text>` with surrounding space and control characters removed, or nothing.
fn quoted(text: &str) -> String {
    let clean: String = text
        .trim()
        .chars()
        .map(|c| {
            if c == '\n' {
                c
            } else if c.is_control() {
                '.'
            } else {
                c
            }
        })
        .collect();
    if clean.is_empty() { clean } else { format!(": {}", clean.replace('\n', "; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_quotes_the_program() {
        let error = ProcessError::Failed {
            program: "mke2fs".into(),
            exit: ProcessExit::Signal(9),
            stderr: "one\ntwo\x1b\n".into(),
        };
        assert_eq!(error.to_string(), "mke2fs was killed by SIGKILL: one; two.");
    }
}
