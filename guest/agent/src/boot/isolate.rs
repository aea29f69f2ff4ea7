//! The agent as an ordinary process: namespaces that stand in for the VM.
//!
//! ```text
//!   caller ── starts ──> outer process: waits, passes the exit code on, removes the cgroup
//!                           └─ fork ──> the agent: pid 1 of its pid namespace, own mounts, network, cgroup root
//! ```
//! Clock and random number generator stay those of the host and are left alone. Controllers that the host's
//! cgroup v2 hierarchy does not have are missing here too, and a spec that asks for one fails.

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

/// Returns in the inner process only.
pub(super) fn enter() -> Result<(), BootError> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| BootError::Read { path: "/proc/self/mountinfo", source })?;
    let host = mounts::find_cgroup2(&mountinfo).ok_or(BootError::NoCgroup2)?;
    let root = host.join(format!("machinen-agent-{}", getpid()));
    let leaf = root.join("agent");
    fs::create_dir_all(&leaf).map_err(|source| BootError::Create { path: leaf, source })?;
    // The new cgroup namespace has its root where its maker was at that moment.
    write(root.join("cgroup.procs"), &pid_text(getpid()))?;
    unshare(
        CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .map_err(BootError::Namespaces)?;
    // Controllers can be given to the containers only while no process is in their ancestor itself.
    write(host.join("cgroup.procs"), &pid_text(getpid()))?;
    match sys::fork().map_err(BootError::Fork)? {
        ForkResult::Parent { child } => outlive(child, &root),
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
    // It hides the host's hierarchies, v1 ones included: what is below looks like a machine of its own.
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

/// The outer process: it lives as long as the agent and clears up what cannot go with a namespace.
fn outlive(agent: Pid, root: &Path) -> ! {
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
