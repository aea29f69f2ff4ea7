//! The process that serves one view: it answers FUSE requests from the agent with the files below a
//! container's root.
//!
//! The server is in none of the container's namespaces and not in its cgroup, so the container neither sees
//! nor freezes it, and a checkpoint does not include it. It serves one request at a time, and a request that
//! blocks delays only the same view. The server ends when its socket is closed, or is killed.

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

/// The OOM killer prefers this process to the containers.
const OOM_SCORE: &str = "500";

/// Serves until the agent closes `socket`.
pub(crate) fn serve(root: OwnedFd, socket: OwnedFd) -> ! {
    match run(root, socket) {
        Ok(()) => sys::exit_now(0),
        Err(err) => console::fail(&format!("cannot serve a container's files: {err}")),
    }
}

fn run(root: OwnedFd, socket: OwnedFd) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    nix::sys::prctl::set_name(c"machinen-view")?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE)?;
    // The host's kernel has applied the umask of the calling process.
    umask(Mode::empty());
    // The numbers of files must not repeat those of an earlier server: a later server starts with higher
    // ones.
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let first = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2);
    let files = FileSystem::new(Tree::new(root, first));
    match Session::from_fd(files, socket, SessionACL::All, Config::default())?.run() {
        // This is how fuser reports the end of the socket.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(()),
        ended => ended,
    }
}
