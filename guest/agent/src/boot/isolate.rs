//! Runs the agent as an ordinary process, in namespaces that replace the VM.
//!
//! ```text
//!   caller ── starts ──> outer process: waits, passes the exit code on, removes the cgroup
//!                           └─ fork ──> the agent: pid 1 of its pid namespace, own mounts, network, cgroup root
//! ```
//! The clock and the random number generator are the host's and are not touched. Controllers that the host's
//! cgroup v2 hierarchy lacks are missing here too, and a spec that needs one fails.

use std::{fs, os::unix::process::ExitStatusExt, path::Path, process::ExitStatus};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        signal::Signal,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, getpid},
};

use super::{BootError, mounts, pid_text, write};
use crate::{cgroup, sys};

/// Forks the inner process, and returns only there.
pub(super) fn enter() -> Result<(), BootError> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| BootError::Read { path: "/proc/self/mountinfo", source })?;
    let host = mounts::find_cgroup2(&mountinfo).ok_or(BootError::NoCgroup2)?;
    let root = host.join(format!("machinen-agent-{}", getpid()));
    let leaf = root.join("agent");
    fs::create_dir_all(&leaf).map_err(|source| BootError::Create { path: leaf, source })?;
    // The root of a new cgroup namespace is the cgroup of the process that creates it.
    write(root.join("cgroup.procs"), &pid_text(getpid()))?;
    unshare(
        CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .map_err(BootError::Namespaces)?;
    // Controllers can be enabled for the containers only while no process is in an ancestor of their cgroups.
    write(host.join("cgroup.procs"), &pid_text(getpid()))?;
    match sys::fork().map_err(BootError::Fork)? {
        ForkResult::Parent { child } => wait_and_clean_up(child, &root),
        ForkResult::Child => inner(),
    }
}

fn inner() -> Result<(), BootError> {
    set_pdeathsig(Signal::SIGKILL).map_err(BootError::Namespaces)?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(BootError::Namespaces)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount_on("none", "/", private, "")?;
    mount_on("proc", "/proc", MsFlags::empty(), "")?;
    mount_on("tmpfs", "/run", MsFlags::empty(), "mode=755")?;
    // This hides the host's hierarchies, those of v1 too, so that the rest looks like a separate machine.
    mount_on("cgroup2", cgroup::ROOT, MsFlags::empty(), "")?;
    write(Path::new(cgroup::ROOT).join("agent/cgroup.procs"), "1")
}

fn mount_on(fstype: &'static str, target: &'static str, flags: MsFlags, data: &str) -> Result<(), BootError> {
    mount(Some(fstype), target, Some(fstype), flags, Some(data)).map_err(|source| BootError::Mount {
        fstype,
        target: target.into(),
        source,
    })
}

/// The outer process lives as long as the agent, and removes what does not disappear with a namespace.
fn wait_and_clean_up(agent: Pid, root: &Path) -> ! {
    let code = match waitpid(agent, None) {
        Ok(WaitStatus::Exited(_, code)) => code,
        Ok(WaitStatus::Signaled(_, signal, _)) => {
            crate::console::say(&format!("ended by {}", ExitStatus::from_raw(signal as i32)));
            1
        }
        Ok(_) | Err(_) => 1,
    };
    if let Err(err) = cgroup::remove_tree(root) {
        crate::console::say(&format!("cannot remove cgroup {}: {err}", root.display()));
    }
    std::process::exit(code)
}
