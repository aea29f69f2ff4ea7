//! Another name for the machine that restored processes see: CRIU gives them the one that they had.

use std::{fs::File, os::unix::fs::MetadataExt as _, path::PathBuf};

use nix::{
    sched::{CloneFlags, setns},
    unistd::{Pid, sethostname},
};

use super::CriuError;

/// Sets the hostname in the UTS namespace of a process.
///
/// # Errors
/// There is no such process, or the kernel does not take the name.
pub(super) fn rename(pid: Pid, name: &str) -> Result<(), CriuError> {
    let open =
        |path: PathBuf| File::open(&path).map_err(|source| CriuError::File { what: "open", path, source });
    let ours = open("/proc/self/ns/uts".into())?;
    let theirs = open(format!("/proc/{pid}/ns/uts").into())?;
    let inode = |file: &File| file.metadata().map(|status| status.ino()).map_err(CriuError::Namespace);
    if inode(&ours)? == inode(&theirs)? {
        // They share the VM's, which has its name from the pod.
        return Ok(());
    }
    let failed = |source| CriuError::Hostname { name: name.to_owned(), source };
    // There is one thread, and nothing else happens before it is back.
    setns(theirs, CloneFlags::CLONE_NEWUTS).map_err(failed)?;
    let named = sethostname(name);
    setns(ours, CloneFlags::CLONE_NEWUTS).map_err(failed)?;
    named.map_err(failed)
}
