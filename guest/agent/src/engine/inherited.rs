//! What a container's process must not inherit from the agent.

use std::{fs, io};

use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::setgroups,
};

/// Limits on open files of a process whose spec sets none: those that init systems set for services.
const FILES_SOFT: u64 = 1024;
const FILES_HARD: u64 = 524_288;

#[derive(Debug, thiserror::Error)]
pub(super) enum InheritedError {
    #[error("cannot give up the agent's {what}")]
    GiveUp { what: &'static str, source: Errno },
    #[error("cannot set the OOM score")]
    OomScore(#[source] io::Error),
}

/// Gives up the agent's groups, umask and limits.
pub(super) fn give_up() -> Result<(), InheritedError> {
    let failed = |what| move |source| InheritedError::GiveUp { what, source };
    setgroups(&[]).map_err(failed("groups"))?;
    umask(Mode::from_bits_truncate(0o022));
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("limits"))?;
    setrlimit(Resource::RLIMIT_NOFILE, FILES_SOFT, hard.min(FILES_HARD)).map_err(failed("limits"))
}

/// Sets the OOM score, -1000 to 1000 (proc(5), /proc/pid/oom_score_adj).
pub(super) fn set_oom_score(score: &str) -> Result<(), InheritedError> {
    fs::write("/proc/self/oom_score_adj", score).map_err(InheritedError::OomScore)
}
