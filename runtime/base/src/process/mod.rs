//! The one supervisor of child processes.
//!
//! Every program that machinen starts is described by a [`Spawn`]: what to run, what it inherits, and which
//! privileges it gives up. [`Spawn::start`] returns a [`Child`] that is watched, ended and reaped;
//! [`Spawn::run`] waits for a short-lived tool and keeps a bounded part of what it printed.

mod child;
mod foreign;
mod memory;
mod sandbox;
mod spawn;
mod tool;

use std::{io, os::unix::process::ExitStatusExt as _, process::ExitStatus};

pub use child::Child;
pub use foreign::kill_foreign;
pub use memory::tree_pss;
pub use sandbox::{ChildSandbox, Namespaces, RunAs};
pub use spawn::{Spawn, Stdio, ToolOutput};
pub use tool::{find_program, run};

/// Why a child process could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{program} not found; {hint}")]
    NotFound { program: String, hint: String },
    #[error("cannot start {program}")]
    Spawn { program: String, source: io::Error },
    #[error("cannot {action} {program} (pid {pid})")]
    Child { action: &'static str, program: String, pid: u32, source: io::Error },
    #[error("{program} {exit}{}", quoted(.stderr))]
    Failed { program: String, exit: ProcessExit, stderr: String },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessExit {
    Code(i32),
    Signal(i32),
}

impl ProcessExit {
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
