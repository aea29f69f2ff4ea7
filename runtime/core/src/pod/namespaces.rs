//! Which namespaces a container shares with others of its pod.
//!
//! A configuration names a namespace by a path on the host: `/proc/PID/ns/ipc` of the process that stands for another
//! container, or a file on which a client has pinned the namespace for the pod. In the guest the containers then are in
//! the same namespace. Anchors have IPC and UTS namespaces on the host, so these are recognised by their identity. Of the
//! other kinds a container has none on the host, and it is recognised by its process: a process in the mount namespace
//! of the anchor stands for the container.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use machinen_base::error::{ErrorKind, HasKind};
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};

use super::{Container, ContainerId, ContainerSlot, Pod};
use crate::spec::guest::NamedNamespace;

/// The identity of a namespace of the host.
type NsId = (u64, u64);

/// Why a namespace of a container's configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The path cannot be opened.
    #[error("cannot open the {kind} namespace {}", path.display())]
    Open {
        /// The kind of the namespace.
        kind: LinuxNamespaceType,
        /// The path of the configuration.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No container of the pod has the namespace.
    #[error(
        "the {kind} namespace {} is not that of a container in the same VM; only containers of one pod share \
         namespaces", path.display()
    )]
    Foreign {
        /// The kind of the namespace.
        kind: LinuxNamespaceType,
        /// The path of the configuration.
        path: PathBuf,
    },
    /// A restored container has namespaces of its own.
    #[error("a container that is restored from a checkpoint cannot join the {kind} namespace {}", path.display())]
    Restored {
        /// The kind of the namespace.
        kind: LinuxNamespaceType,
        /// The path of the configuration.
        path: PathBuf,
    },
}

impl HasKind for NamespaceError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Open { .. } => ErrorKind::InvalidArgument,
            Self::Foreign { .. } | Self::Restored { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// The namespaces of a container that is to be created, of the kinds that its configuration names.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedNamespaces(Vec<SharedNamespace>);

#[derive(Debug, Clone)]
struct SharedNamespace {
    kind: LinuxNamespaceType,
    path: PathBuf,
    id: NsId,
    /// The container that has the namespace. None: the namespace was pinned, and no container has it yet.
    with: Option<ContainerId>,
}

/// The identities of a container's namespaces.
#[derive(Debug, Clone, Default)]
pub(super) struct ContainerNamespaces {
    /// Of the anchor's mount namespace, by which its process is recognised.
    process: Option<NsId>,
    /// A kind that is not here is the container's own, with the identity of `process`.
    shared: Vec<(LinuxNamespaceType, NsId)>,
}

impl ContainerNamespaces {
    /// The identity of the container's namespace of a kind.
    fn id(&self, kind: LinuxNamespaceType) -> Option<NsId> {
        let shared = self.shared.iter().find(|(shared, _)| *shared == kind);
        shared.map(|(_, id)| *id).or(self.process)
    }
}

impl SharedNamespaces {
    /// What the guest is told: the kinds, and the containers that have the namespaces.
    pub(super) fn joined(&self) -> impl Iterator<Item = (LinuxNamespaceType, &ContainerId)> {
        self.0.iter().filter_map(|shared| Some((shared.kind, shared.with.as_ref()?)))
    }

    /// Adds the namespaces that no container has yet to the configuration for the guest, which makes them.
    pub(super) fn add_new(&self, spec: &mut Spec) {
        let Some(linux) = spec.linux_mut() else { return };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for shared in self.0.iter().filter(|shared| shared.with.is_none()) {
            let own = LinuxNamespaceBuilder::default().typ(shared.kind).build().expect("it has a type");
            namespaces.push(own);
        }
        linux.set_namespaces(Some(namespaces));
    }

    /// The host's namespaces that the anchor joins; it has its own of the other kinds.
    ///
    /// # Errors
    /// A namespace does not exist any more.
    pub(super) fn of_anchor(&self) -> Result<AnchorNamespaces, NamespaceError> {
        let open = |kind| {
            let shared = self.0.iter().find(|shared| shared.kind == kind);
            let open = |SharedNamespace { path, .. }: &SharedNamespace| {
                let failed = |source| NamespaceError::Open { kind, path: path.clone(), source };
                fs::File::open(path).map(OwnedFd::from).map_err(failed)
            };
            shared.map(open).transpose()
        };
        Ok(AnchorNamespaces { ipc: open(LinuxNamespaceType::Ipc)?, uts: open(LinuxNamespaceType::Uts)? })
    }

    /// The identities of the namespaces of the container with this anchor.
    pub(super) fn identities(&self, anchor: u32) -> ContainerNamespaces {
        let ns = |name: &str| identity(Path::new(&format!("/proc/{anchor}/ns/{name}"))).ok();
        let mut shared: Vec<_> = self.0.iter().map(|shared| (shared.kind, shared.id)).collect();
        for (kind, name) in [(LinuxNamespaceType::Ipc, "ipc"), (LinuxNamespaceType::Uts, "uts")] {
            if let Some(id) = ns(name).filter(|_| self.0.iter().all(|shared| shared.kind != kind)) {
                shared.push((kind, id));
            }
        }
        ContainerNamespaces { process: ns("mnt"), shared }
    }
}

/// The host's namespaces that an anchor joins instead of having its own.
#[derive(Debug, Default)]
pub(super) struct AnchorNamespaces {
    pub(super) ipc: Option<OwnedFd>,
    pub(super) uts: Option<OwnedFd>,
}

impl Pod {
    /// Finds out whose the namespaces are that a configuration names. Blocks.
    ///
    /// # Errors
    /// A path cannot be opened, or is that of a process that stands for no container of this pod.
    pub(super) fn shared_namespaces(
        &self,
        named: &[NamedNamespace],
        is_restored: bool,
    ) -> Result<SharedNamespaces, NamespaceError> {
        let containers: Vec<_> = self.containers().values().filter_map(ready).collect();
        let resolve = |NamedNamespace { kind, path }: &NamedNamespace| {
            let (kind, path) = (*kind, path.clone());
            if is_restored {
                return Err(NamespaceError::Restored { kind, path });
            }
            let failed = |source| NamespaceError::Open { kind, path: path.clone(), source };
            let process = process_of(&path);
            let id = match (&process, kind) {
                (_, LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts) | (None, _) => identity(&path),
                (Some(process), _) => identity(&process.join("ns/mnt")),
            };
            let id = id.map_err(failed)?;
            let has_it = |container: &Container| match kind {
                LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => {
                    container.namespaces.id(kind) == Some(id)
                }
                _ => container.namespaces.process == Some(id) || container.namespaces.id(kind) == Some(id),
            };
            let found = containers.iter().find(|container| has_it(container));
            match found {
                Some(container) => {
                    let (id, with) = (container.namespaces.id(kind).unwrap_or(id), container.id.clone());
                    Ok(SharedNamespace { kind, path, id, with: Some(with) })
                }
                None if process.is_none() => Ok(SharedNamespace { kind, path, id, with: None }),
                None => Err(NamespaceError::Foreign { kind, path }),
            }
        };
        named.iter().map(resolve).collect::<Result<_, _>>().map(SharedNamespaces)
    }
}

fn ready(slot: &ContainerSlot) -> Option<std::sync::Arc<Container>> {
    match slot {
        ContainerSlot::Ready(container) => Some(std::sync::Arc::clone(container)),
        ContainerSlot::Creating(_) => None,
    }
}

/// The directory of the process in `/proc`, if a path is that of a process's namespace.
fn process_of(path: &Path) -> Option<PathBuf> {
    let mut parts = path.strip_prefix("/proc").ok()?.components();
    let pid = parts.next()?.as_os_str().to_str()?;
    let is_process = pid == "self" || pid.parse::<u32>().is_ok();
    is_process.then(|| Path::new("/proc").join(pid))
}

fn identity(path: &Path) -> io::Result<NsId> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_processes_are_told_from_pinned_namespaces() {
        let process = |path: &str| process_of(Path::new(path));
        assert_eq!(process("/proc/17/ns/ipc"), Some("/proc/17".into()));
        assert_eq!(process("/proc/self/ns/pid"), Some("/proc/self".into()));
        for path in ["/run/ipcns/1", "/proc/sys/ns", "/proc", "ns/1"] {
            assert_eq!(process(path), None, "{path}");
        }
    }

    #[test]
    fn a_kind_that_is_not_shared_is_recognised_by_the_process() {
        let own =
            ContainerNamespaces { process: Some((1, 2)), shared: vec![(LinuxNamespaceType::Ipc, (3, 4))] };
        assert_eq!(own.id(LinuxNamespaceType::Ipc), Some((3, 4)));
        assert_eq!(own.id(LinuxNamespaceType::Pid), Some((1, 2)));
        assert_eq!(ContainerNamespaces::default().id(LinuxNamespaceType::Pid), None);
    }

    #[test]
    fn a_pinned_namespace_is_made_by_the_first_container_that_names_it() {
        let shared =
            |with| SharedNamespace { kind: LinuxNamespaceType::Ipc, path: "/p".into(), id: (1, 1), with };
        let mut spec = Spec::default();
        spec.linux_mut().as_mut().unwrap().set_namespaces(None);
        SharedNamespaces(vec![shared(None)]).add_new(&mut spec);
        let kinds = |spec: &Spec| -> Vec<_> {
            let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap_or_default();
            namespaces.iter().map(|namespace| namespace.typ()).collect()
        };
        assert_eq!(kinds(&spec), [LinuxNamespaceType::Ipc]);
        let joined = SharedNamespaces(vec![shared(Some(ContainerId::parse("c").unwrap()))]);
        joined.add_new(&mut spec);
        assert_eq!(kinds(&spec).len(), 1);
        assert_eq!(joined.joined().count(), 1);
    }
}
