//! The namespaces of a container that other containers of the VM can join.

use std::{
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use machinen_protocol::api::JoinedNamespace;
use nix::unistd::Pid;

use super::{Container, ContainerError, IdTable};

/// Types of an OCI configuration, and names in /proc/PID/ns (namespaces(7)). Mounts are each container's own, the network
/// is the VM's, and a time namespace cannot be joined by a process that forks.
const TYPES: [(&str, &str); 5] =
    [("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("user", "user"), ("cgroup", "cgroup")];

/// Descriptors of a container's namespaces, which outlive its processes.
#[derive(Debug)]
pub(super) struct HeldNamespaces(Vec<(&'static str, File)>);

/// A namespace that a new container joins, in the form of an OCI configuration.
#[derive(Debug)]
pub(crate) struct NamespacePath {
    pub(crate) kind: &'static str,
    pub(crate) path: PathBuf,
    /// Keeps the path valid.
    _file: File,
}

impl HeldNamespaces {
    /// Opens the namespaces of a container's init.
    ///
    /// # Errors
    /// The init has ended.
    pub(super) fn of(init: Pid) -> Result<Self, ContainerError> {
        let open = |(kind, name): (&'static str, &str)| {
            let path = Path::new("/proc").join(init.to_string()).join("ns").join(name);
            let file = File::open(&path);
            file.map(|file| (kind, file)).map_err(|source| ContainerError::State {
                what: "open",
                path,
                source,
            })
        };
        TYPES.into_iter().map(open).collect::<Result<_, _>>().map(Self)
    }
}

/// Finds the namespaces that a new container joins.
///
/// # Errors
/// A container or a type does not exist.
pub(crate) fn find(
    containers: &IdTable<Container>,
    wanted: &[JoinedNamespace],
) -> Result<Vec<NamespacePath>, ContainerError> {
    let one = |wanted: &JoinedNamespace| {
        let container = containers.get(&wanted.container_id)?;
        let HeldNamespaces(held) = &container.namespaces;
        let unknown = || ContainerError::NamespaceType { kind: wanted.type_.clone() };
        let (kind, file) = held.iter().find(|(kind, _)| *kind == wanted.type_).ok_or_else(unknown)?;
        let duplicate = file.try_clone();
        let failed = |source| ContainerError::State { what: "duplicate", path: (*kind).into(), source };
        let file = duplicate.map_err(failed)?;
        // The engine opens it by its path, in a process that does not have the descriptor.
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into();
        Ok(NamespacePath { kind, path, _file: file })
    };
    wanted.iter().map(one).collect()
}
