//! Runs the agent as an ordinary process, in namespaces that replace the VM.
//!
//! ```text
//!   caller ── starts ──> outer process: waits, passes the exit code on, removes the cgroup
//!                           └─ fork ──> the agent: pid 1 of its pid namespace, own mounts, network, cgroup root
//! ```
//! The clock and the random number generator are the host's and are not touched. Controllers that the host's
//! cgroup v2 hierarchy lacks are missing here too, and a spec that needs one fails.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::ExitStatus,
};

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
    fs::create_dir_all(&leaf).map_err(|source| BootError::Create { path: leaf.clone(), source })?;
    // Opened in the host's cgroup namespace: a hierarchy that is mounted with nsdelegate, as by systemd, refuses
    // moves across the border of a namespace to descriptors that were opened inside of it.
    let (outside, inside) = (CgroupEntry::open(&host)?, CgroupEntry::open(&leaf)?);
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
    outside.enter()?;
    match sys::fork().map_err(BootError::Fork)? {
        ForkResult::Parent { child } => wait_and_clean_up(child, &root),
        ForkResult::Child => inner(inside),
    }
}

/// An open way into a cgroup.
struct CgroupEntry {
    path: PathBuf,
    procs: File,
}

impl CgroupEntry {
    fn open(cgroup: &Path) -> Result<Self, BootError> {
        let path = cgroup.join("cgroup.procs");
        let procs = File::options().write(true).open(&path);
        let procs = procs.map_err(|source| BootError::Write { path: path.clone(), source })?;
        Ok(Self { path, procs })
    }

    /// Moves this process into the cgroup.
    fn enter(mut self) -> Result<(), BootError> {
        self.procs.write_all(b"0").map_err(|source| BootError::Write { path: self.path, source })
    }
}

fn inner(agent_cgroup: CgroupEntry) -> Result<(), BootError> {
    set_pdeathsig(Signal::SIGKILL).map_err(BootError::Namespaces)?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(BootError::Namespaces)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount_on("none", "/", private, "")?;
    mount_on("proc", "/proc", MsFlags::empty(), "")?;
    mount_on("tmpfs", "/run", MsFlags::empty(), "mode=755")?;
    // This hides the host's hierarchies, those of v1 too, so that the rest looks like a separate machine.
    mount_on("cgroup2", cgroup::ROOT, MsFlags::empty(), "")?;
    agent_cgroup.enter()
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
