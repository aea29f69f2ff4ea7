//! Finds out from the kernel which namespaces a process does not share with the agent.
//!
//! The configuration is not enough: CRIU restores a container into a time namespace that no configuration
//! asks for, so that its clocks continue.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;

/// Names in /proc/PID/ns (namespaces(7)), and the flags for setns(2).
const KINDS: [(&str, i32); 8] = [
    ("mnt", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("user", libc::CLONE_NEWUSER),
    ("net", libc::CLONE_NEWNET),
    ("time", libc::CLONE_NEWTIME),
];

#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    #[error("cannot examine {path}")]
    Read { path: PathBuf, source: io::Error },
}

/// The CLONE_NEW* flags of the namespaces of `pid` that are not the agent's. A user namespace is included
/// only if it has room for any process of the container; see [`admits_processes`].
///
/// # Errors
/// The process has ended, which is NotFound, or cannot be examined.
pub(super) fn not_shared(pid: Pid) -> Result<i32, NamespaceError> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mut flags = 0;
    for (name, flag) in KINDS {
        if !is_shared(&process, name)? {
            flags |= flag;
        }
    }
    if flags & libc::CLONE_NEWUSER != 0 && !admits_processes(&process)? {
        flags &= !libc::CLONE_NEWUSER;
    }
    Ok(flags)
}

/// Whether the agent and the process share a kind of namespace; true for a kind that the kernel does not
/// have.
fn is_shared(process: &Path, name: &str) -> Result<bool, NamespaceError> {
    let identity = |process: &Path| {
        let path = process.join("ns").join(name);
        match fs::metadata(&path) {
            Ok(status) => Ok((status.dev(), status.ino())),
            Err(source) => Err(NamespaceError::Read { path, source }),
        }
    };
    match identity(Path::new("/proc/self")) {
        Ok(ours) => Ok(ours == identity(process)?),
        Err(NamespaceError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(err) => Err(err),
    }
}

/// Whether another process can become any user and group of a process's user namespace, as in one that a
/// container's configuration asks for. An init may also have entered a user namespace by itself (`unshare
/// -U`), with at most one user: an added process then joins the other namespaces and has the users of the
/// configuration, as with runc.
fn admits_processes(process: &Path) -> Result<bool, NamespaceError> {
    let read = |name: &str| {
        let path = process.join(name);
        fs::read_to_string(&path).map_err(|source| NamespaceError::Read { path, source })
    };
    Ok(read("setgroups")?.trim_end() == "allow"
        && maps_root(&read("uid_map")?)
        && maps_root(&read("gid_map")?))
}

/// Whether a map has the inner id 0 (user_namespaces(7)).
fn maps_root(map: &str) -> bool {
    map.lines().any(|line| line.split_ascii_whitespace().next() == Some("0"))
}

impl NamespaceError {
    /// Whether the reason is that the process has ended.
    pub(super) fn is_gone(&self) -> bool {
        let Self::Read { source, .. } = self;
        source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(libc::ESRCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shares_all_namespaces_with_itself() {
        assert_eq!(not_shared(nix::unistd::getpid()).unwrap(), 0);
    }

    #[test]
    fn a_process_that_has_ended_is_reported_so() {
        // Larger than any pid.
        let err = not_shared(Pid::from_raw(1 << 30)).unwrap_err();
        assert!(err.is_gone(), "{err}");
    }

    #[test]
    fn a_map_without_root_admits_no_processes() {
        assert!(maps_root("         0     100000      65536\n"));
        assert!(maps_root("1 5 1\n0 7 1\n"));
        assert!(!maps_root("      1000       1000          1\n"));
        assert!(!maps_root(""));
    }
}
