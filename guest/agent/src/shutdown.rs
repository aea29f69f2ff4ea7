//! The end of the VM: nothing runs any more, and what was written is on its disk.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, sync};

use crate::{agent::Parts, console};

/// Kills every process but the agent, waits for them, and unmounts the containers' file systems.
pub(crate) async fn run(parts: &Parts) {
    // From init of a pid namespace, -1 means all but itself.
    if let Err(err) = kill(Pid::from_raw(-1), Signal::SIGKILL)
        && err != nix::errno::Errno::ESRCH
    {
        console::say(&format!("cannot kill all processes: {err}"));
    }
    parts.reaper.childless().await;
    for container in parts.containers.all() {
        container.shut_down();
    }
    // For what could not be unmounted.
    sync();
}
