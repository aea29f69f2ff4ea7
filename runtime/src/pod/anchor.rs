//! The host process whose pid stands for a container.
//!
//! Clients look at `/proc/<pid>/ns/net` and friends, and signal it. The VMM's pid would send them to the VMM's
//! namespaces, the guest's pid to a stranger, so each container has one process that does nothing in the container's
//! own namespaces. It ends with the container, and with the process that owns the VM.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::process::{Child, Namespaces, ProcessError, Sandbox, Spawn};

/// First argument with which a binary that owns VMs runs [`main`] instead of its own work.
pub const ARGUMENT: &str = "container-anchor";

/// Why there is no anchor.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    #[error("cannot open the network namespace {}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("cannot start the container's anchor process")]
    Spawn(#[source] ProcessError),
}

/// Starts the anchor of a container, in the network namespace at `netns` or a fresh one.
///
/// # Errors
/// The namespace cannot be opened, or the process not started.
pub fn spawn(netns: Option<&Path>) -> Result<Child, AnchorError> {
    let mut spawn = Spawn::new("/proc/self/exe").args([ARGUMENT]).sandbox(Sandbox {
        namespaces: Namespaces { net: netns.is_none(), mount: true, ipc: true, uts: true },
        drop_capabilities: true,
        no_new_privileges: true,
        no_core: true,
        ..Sandbox::default()
    });
    if let Some(path) = netns {
        let file = File::open(path).map_err(|source| AnchorError::Netns { path: path.into(), source })?;
        spawn = spawn.join_netns(file.into());
    }
    spawn.start().map_err(AnchorError::Spawn)
}

/// What the anchor does: wait to be killed.
pub fn main() -> ! {
    loop {
        nix::unistd::pause();
    }
}
