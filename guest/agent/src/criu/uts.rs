//! Sets the hostname of restored processes, which CRIU restores with their old one.

use std::{fs::File, os::unix::fs::MetadataExt as _, path::PathBuf};

use nix::{
    sched::{CloneFlags, setns},
    unistd::{Pid, sethostname},
};

use super::CriuError;

/// Sets the hostname in the UTS namespace of a process.
///
/// # Errors
/// The process does not exist, or the kernel refuses the name.
pub(super) fn rename(pid: Pid, name: &str) -> Result<(), CriuError> {
    let open =
        |path: PathBuf| File::open(&path).map_err(|source| CriuError::File { what: "open", path, source });
    let ours = open("/proc/self/ns/uts".into())?;
    let theirs = open(format!("/proc/{pid}/ns/uts").into())?;
    let inode = |file: &File| file.metadata().map(|status| status.ino()).map_err(CriuError::Namespace);
    if inode(&ours)? == inode(&theirs)? {
        // They share the VM's namespace, which has the pod's hostname.
        return Ok(());
    }
    let failed = |source| CriuError::Hostname { name: name.to_owned(), source };
    // The agent has one thread, and does nothing else before it is back in its own namespace.
    setns(theirs, CloneFlags::CLONE_NEWUTS).map_err(failed)?;
    let named = sethostname(name);
    setns(ours, CloneFlags::CLONE_NEWUTS).map_err(failed)?;
    named.map_err(failed)
}
