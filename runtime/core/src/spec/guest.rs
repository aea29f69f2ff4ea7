//! Reduces an OCI configuration to the part that applies inside the guest.
//!
//! The host keeps its own part (hooks, the network namespace, labels of its security modules, the cgroup
//! path) and passes the rest on. Names of the host's CPUs and memory nodes are translated later, when the
//! container's VM is known. What is not supported is refused by name, never dropped silently.

use std::path::{Path, PathBuf};

use machinen_base::error::{ErrorKind, HasKind};
use oci_spec::runtime::{
    Hooks, Linux, LinuxBuilder, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, Mount, Process, Spec,
};

use super::{
    cpus,
    disks::{DISK_KINDS, DiskRequest},
    hooks::{self, HookSpecError},
    resources::{self, ResourcesError},
    volumes::{self, VolumeError, VolumeMount},
};

/// Largest host file that is copied into a container, bytes.
pub const MAX_INJECTED: u64 = 1 << 20;

/// Types of file systems that the guest's kernel provides.
const GUEST_KINDS: &[&str] = &["proc", "sysfs", "devpts", "tmpfs", "mqueue", "cgroup", "cgroup2"];

/// Files of the host that `ctr run --net-host` binds. They are copied when the container is created, so that such a
/// container can be checkpointed; all other bind mounts are volumes.
const INJECTED: &[&str] = &["/etc/hosts", "/etc/resolv.conf"];

/// A container's configuration for the guest.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// The configuration that the agent receives.
    pub spec: Spec,
    /// The hooks that run on the host.
    pub hooks: Hooks,
    /// Files of the host whose content the container receives.
    pub injected: Vec<Injected>,
    /// The bind mounts of the configuration; see [`GuestSpec::for_vm`].
    pub volumes: Vec<VolumeMount>,
    /// The block devices of the host in the configuration.
    pub disks: Vec<DiskRequest>,
    /// The other namespaces that the configuration names by their paths on the host. They are not in `spec`.
    pub named: Vec<NamedNamespace>,
    /// Path of the container's network namespace on the host, if the configuration names one.
    pub netns: Option<PathBuf>,
    /// The configuration has no network namespace, which asks for the host's.
    pub host_network: bool,
    /// `linux.cgroupsPath`, which names a cgroup of the host. The guest has another one.
    pub cgroups_path: Option<PathBuf>,
}

/// A namespace that a configuration names by its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedNamespace {
    /// The kind: pid, ipc, uts, user or cgroup.
    pub kind: LinuxNamespaceType,
    /// The path on the host.
    pub path: PathBuf,
}

/// A host file that is copied to `destination` in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    /// The file on the host.
    pub source: PathBuf,
    /// The path in the container.
    pub destination: String,
}

/// Why a configuration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReduceError {
    /// A bind mount cannot be provided.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The type of the mount is not supported.
    #[error("mount {} has the type {kind:?}, which is not supported; supported are {}", destination.display(), [GUEST_KINDS, DISK_KINDS, &["overlay"]].concat().join(", "))]
    MountKind {
        /// The path in the container.
        destination: PathBuf,
        /// The type of the mount.
        kind: String,
    },
    /// A mount has no destination.
    #[error("a mount has no destination")]
    NoDestination,
    /// A hook cannot be run.
    #[error(transparent)]
    Hook(#[from] HookSpecError),
    /// There are two namespaces of one kind.
    #[error("linux.namespaces has two {kind} namespaces")]
    TwoNamespaces {
        /// The kind of the namespaces.
        kind: LinuxNamespaceType,
    },
    /// There are clock offsets, but no time namespace that they could apply to.
    #[error("linux.timeOffsets needs a namespace of type \"time\" in linux.namespaces, which has none")]
    OffsetsWithoutNamespace,
    /// A namespace of this kind cannot be that of another container.
    #[error("joining the {kind} namespace {} is not supported: each container has its own", path.display())]
    SharedNamespace {
        /// The kind of the namespace.
        kind: LinuxNamespaceType,
        /// The path of the namespace.
        path: PathBuf,
    },
    /// The field is not supported.
    #[error("{field} is not supported: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// Why the field is not supported.
        reason: &'static str,
    },
    /// A limit is refused.
    #[error(transparent)]
    Resources(#[from] ResourcesError),
}

impl HasKind for ReduceError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDestination | Self::TwoNamespaces { .. } | Self::OffsetsWithoutNamespace => {
                ErrorKind::InvalidArgument
            }
            Self::Hook(error) => error.kind(),
            Self::Resources(error) => error.kind(),
            Self::Volume(error) => error.kind(),
            _ => ErrorKind::Unimplemented,
        }
    }
}

/// Reduces a host's configuration to the guest's.
///
/// # Errors
/// The first part of the configuration that machinen does not support.
pub fn reduce(mut spec: Spec, id: &str) -> Result<GuestSpec, ReduceError> {
    let hooks = hooks::take(&mut spec)?;
    let HostMounts { injected, volumes, mut disks } = take_host_mounts(&mut spec)?;
    let mounts_cgroups = mounts_cgroups(&spec);
    let linux = spec.linux_mut().get_or_insert_with(empty_linux);
    if mounts_cgroups {
        add_cgroup_namespace(linux);
    }
    let host_network = !linux.namespaces().iter().flatten().any(is_network);
    let (netns, named) = take_namespaces(linux)?;
    // The guest has one cgroup tree and no security modules, so the host's names have no meaning there.
    let cgroups_path = linux.cgroups_path().clone();
    linux.set_cgroups_path(Some(Path::new("/machinen").join(id)));
    linux.set_mount_label(None);
    reduce_linux(linux)?;
    if !may_use_any_device(linux) {
        disks.extend(DiskRequest::of_devices(linux));
    }
    if let Some(process) = spec.process_mut() {
        drop_labels(process);
        if process.exec_cpu_affinity().is_some() {
            return Err(ReduceError::Field {
                field: "process.execCPUAffinity",
                reason: "the guest's CPUs are not the host's",
            });
        }
    }
    Ok(GuestSpec { spec, hooks, injected, volumes, disks, named, netns, host_network, cgroups_path })
}

/// The bind mounts of a host's configuration.
///
/// # Errors
/// The first mount that machinen does not support.
pub fn volumes(mut spec: Spec) -> Result<Vec<VolumeMount>, ReduceError> {
    take_host_mounts(&mut spec).map(|mounts| mounts.volumes)
}

/// The path of the network namespace that a host's configuration names.
pub(crate) fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces.iter().find(|namespace| is_network(namespace));
    network.and_then(|namespace| namespace.path().clone())
}

fn is_network(namespace: &LinuxNamespace) -> bool {
    namespace.typ() == LinuxNamespaceType::Network
}

impl GuestSpec {
    /// Returns the configuration for a guest with `cpus` CPUs.
    pub fn for_vm(&self, cpus: u32) -> Spec {
        let mut spec = self.spec.clone();
        if let Some(resources) = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut()) {
            cpus::translate(resources, cpus);
        }
        spec
    }
}

/// What the absence of a `linux` section means: there are no limits, and the container has no namespaces of
/// its own.
fn empty_linux() -> Linux {
    let mut linux = LinuxBuilder::default().build().expect("every field has a default");
    linux.set_resources(None).set_namespaces(None).set_masked_paths(None).set_readonly_paths(None);
    linux
}

fn reduce_linux(linux: &mut Linux) -> Result<(), ReduceError> {
    let has_devices = linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty());
    for (field, given, reason) in [
        ("linux.intelRdt", linux.intel_rdt().is_some(), "a VM has no cache and bandwidth classes"),
        ("linux.netDevices", has_devices, "the host's network devices are not the VM's"),
    ] {
        if given {
            return Err(ReduceError::Field { field, reason });
        }
    }
    if let Some(mut policy) = linux.memory_policy().clone() {
        if cpus::set("memoryPolicy.nodes", policy.nodes().as_deref())?.is_some() {
            // The guest has one node.
            policy.set_nodes(Some("0".to_owned()));
        }
        linux.set_memory_policy(Some(policy));
    }
    if let Some(mut limits) = linux.resources().clone() {
        resources::for_creation(&mut limits)?;
        linux.set_resources(Some(limits));
    }
    Ok(())
}

/// Whether the container may use all devices. A privileged container has a node for each device of the host,
/// of any type.
fn may_use_any_device(linux: &Linux) -> bool {
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    let is_about_all = |rule: &&LinuxDeviceCgroup| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && [rule.major(), rule.minor()].iter().all(|number| number.is_none_or(|number| number < 0))
    };
    rules.into_iter().flatten().rfind(is_about_all).is_some_and(LinuxDeviceCgroup::allow)
}

/// Removes the labels of the host's security modules, which the guest does not have.
pub(super) fn drop_labels(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

/// What the mounts of a configuration have of the host.
struct HostMounts {
    injected: Vec<Injected>,
    volumes: Vec<VolumeMount>,
    disks: Vec<DiskRequest>,
}

/// Takes the mounts of the host's files out of the configuration. A volume or disk keeps its place among the mounts, where
/// its source is set when the container is created.
fn take_host_mounts(spec: &mut Spec) -> Result<HostMounts, ReduceError> {
    let (mut injected, mut volumes, mut disks) = (Vec::new(), Vec::new(), Vec::new());
    let mut kept = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        if mount.destination().as_os_str().is_empty() {
            return Err(ReduceError::NoDestination);
        }
        let mut mount = mount.clone();
        // On Linux a relative destination is relative to the root (config.md, "Mounts").
        mount.set_destination(Path::new("/").join(mount.destination()));
        let destination = mount.destination();
        if is_bind(&mount) {
            let source = mount.source().clone().unwrap_or_default();
            match destination.to_str().filter(|path| INJECTED.contains(path) && source == Path::new(path)) {
                Some(path) => injected.push(Injected { source, destination: path.to_owned() }),
                None => {
                    volumes.push(VolumeMount::take(&mut mount, kept.len(), spec.linux().as_ref())?);
                    kept.push(mount);
                }
            }
            continue;
        }
        let kind = mount.typ().clone().unwrap_or_default();
        if kind == "overlay" {
            volumes.extend(volumes::take_overlay(&mut mount, kept.len())?);
        } else if let Some(disk) = DiskRequest::of_mount(&mount, kept.len()) {
            disks.push(disk);
        } else if !GUEST_KINDS.contains(&kind.as_str()) {
            return Err(ReduceError::MountKind { destination: destination.clone(), kind });
        }
        kept.push(mount);
    }
    spec.set_mounts(Some(kept));
    Ok(HostMounts { injected, volumes, disks })
}

/// runc's rule: the type `bind`, or a `bind`/`rbind` option with any type.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// Removes the network namespace, because containers in the guest share that of the VM, which is the pod's, and the
/// namespaces that have a path. Adds a mount namespace, which every container has.
fn take_namespaces(linux: &mut Linux) -> Result<(Option<PathBuf>, Vec<NamedNamespace>), ReduceError> {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let (mut netns, mut named) = (None, Vec::new());
    for (number, namespace) in namespaces.iter().enumerate() {
        let kind = namespace.typ();
        if namespaces[..number].iter().any(|other| other.typ() == kind) {
            return Err(ReduceError::TwoNamespaces { kind });
        }
        match (namespace.typ(), namespace.path()) {
            (LinuxNamespaceType::Network, path) => netns = path.clone(),
            (kind @ (LinuxNamespaceType::Mount | LinuxNamespaceType::Time), Some(path)) => {
                return Err(ReduceError::SharedNamespace { kind, path: path.clone() });
            }
            (kind, Some(path)) => named.push(NamedNamespace { kind, path: path.clone() }),
            (_, None) => {}
        }
    }
    namespaces
        .retain(|namespace| namespace.typ() != LinuxNamespaceType::Network && namespace.path().is_none());
    let has_offsets = linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty());
    if has_offsets && namespaces.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::Time) {
        return Err(ReduceError::OffsetsWithoutNamespace);
    }
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Mount) {
        // Without it the container would share the mounts of the VM's agent, which are of no use to it.
        namespaces.push(
            LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Mount).build().expect("it has a type"),
        );
    }
    linux.set_namespaces(Some(namespaces));
    Ok((netns, named))
}

fn mounts_cgroups(spec: &Spec) -> bool {
    let mut kinds = spec.mounts().iter().flatten().filter_map(|mount| mount.typ().as_deref());
    kinds.any(|kind| ["cgroup", "cgroup2"].contains(&kind))
}

/// Adds a cgroup namespace to a container that mounts cgroups, if the configuration has none.
///
/// On a host with cgroup v1 clients request none, since that mount shows a container its own groups there.
/// The guest only has version 2, where the same configuration would show the root of the VM's tree: programs
/// would find no limits in it, and a privileged container that creates groups (as dockerd does by default)
/// would leave its own group, with its limits.
fn add_cgroup_namespace(linux: &mut Linux) {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    if namespaces.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::Cgroup) {
        let mut own = LinuxNamespace::default();
        own.set_typ(LinuxNamespaceType::Cgroup);
        namespaces.push(own);
        linux.set_namespaces(Some(namespaces));
    }
}

#[cfg(test)]
mod tests;
