//! The process that serves one view: FUSE requests from the agent, answered with what is below a container's root.
//!
//! It is forked for the view and is in none of the container's namespaces and not in its cgroup, so the container neither
//! sees nor freezes it, and a checkpoint does not find it. It serves one request at a time, and what blocks it blocks nobody
//! else; to end it is to close its socket, or to kill it.

use std::{fs, io, os::fd::OwnedFd, time::Duration};

use fuser::{Config, Session, SessionACL};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        stat::{Mode, umask},
    },
    time::{ClockId, clock_gettime},
};

use super::{filesystem::FileSystem, tree::Tree};
use crate::{console, sys};

/// More likely to be ended for want of memory than what the VM is for.
const OOM_SCORE: &str = "500";

/// Serves until the agent closes `socket`.
pub(crate) fn serve(root: OwnedFd, socket: OwnedFd) -> ! {
    match run(root, socket) {
        Ok(()) => sys::exit_now(0),
        Err(err) => {
            console::say(&format!("cannot serve a container's files: {err}"));
            sys::exit_now(1)
        }
    }
}

fn run(root: OwnedFd, socket: OwnedFd) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    nix::sys::prctl::set_name(c"machinen-view")?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE)?;
    // The host's kernel has applied that of whoever asks.
    umask(Mode::empty());
    // A number that an earlier server has given is none of this one's: one that serves later begins with higher ones.
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let first = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2);
    let files = FileSystem::of(Tree::new(root, first));
    match Session::from_fd(files, socket, SessionACL::All, Config::default())?.run() {
        // What fuser makes of the end of a socket.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(()),
        ended => ended,
    }
}
