//! The end of the VM: no process runs any more, and everything that was written is on its disk.

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, sync},
};

use crate::{
    console,
    container::{Container, IdTable},
    reaper::Reaper,
};

/// Kills every process but the agent, waits for them, and unmounts the containers' file systems.
pub(crate) async fn run(reaper: &Reaper, containers: &IdTable<Container>) {
    // For the init of a pid namespace, -1 means all processes but itself.
    if let Err(err) = kill(Pid::from_raw(-1), Signal::SIGKILL)
        && err != Errno::ESRCH
    {
        console::say(&format!("cannot kill all processes: {err}"));
    }
    reaper.childless().await;
    for container in containers.all() {
        container.shut_down();
    }
    // For file systems that could not be unmounted.
    sync();
}
