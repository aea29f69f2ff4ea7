//! What of an OCI configuration holds inside the guest.
//!
//! The host keeps its own part (hooks, the network namespace, labels of its security modules, the cgroup path) and
//! hands the rest on unchanged. What cannot be kept is refused by name, never dropped silently.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Process, Spec};

use crate::error::{ErrorKind, Kind};

/// Largest host file that is copied into a container, bytes.
pub const MAX_INJECTED: u64 = 1 << 20;

/// Kinds of file systems that the guest's kernel mounts by itself.
const GUEST_KINDS: &[&str] = &["proc", "sysfs", "devpts", "tmpfs", "mqueue", "cgroup", "cgroup2"];

/// Files that `ctr run --net-host` binds from the host. They are copied when the container is created.
const INJECTED: &[&str] = &["/etc/hosts", "/etc/resolv.conf"];

/// What the guest is told about a container.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    pub spec: Spec,
    pub injected: Vec<Injected>,
    /// Where the container's network namespace is on the host, if the configuration names one.
    pub netns: Option<PathBuf>,
}

/// A host file that is copied to `destination` in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Injected {
    pub source: PathBuf,
    pub destination: String,
}

/// What of a configuration machinen cannot do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReduceError {
    #[error("mount {} of the host path {} is not supported yet (bind mounts come with volumes)", destination.display(), source_path.display())]
    Bind { destination: PathBuf, source_path: PathBuf },
    #[error("mount {} has the type {kind:?}, which is not supported; supported are {}", destination.display(), GUEST_KINDS.join(", "))]
    MountKind { destination: PathBuf, kind: String },
    #[error("mount destination {} is not an absolute path", destination.display())]
    RelativeDestination { destination: PathBuf },
    #[error("OCI {hook} hooks are not supported yet")]
    Hook { hook: &'static str },
    #[error("joining the {kind} namespace {} of another container is not supported yet", path.display())]
    SharedNamespace { kind: LinuxNamespaceType, path: PathBuf },
}

impl Kind for ReduceError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::RelativeDestination { .. } => ErrorKind::InvalidArgument,
            _ => ErrorKind::Unimplemented,
        }
    }
}

/// Reduces a host's configuration to the guest's.
///
/// # Errors
/// The first thing that machinen cannot keep.
pub fn reduce(mut spec: Spec, id: &str) -> Result<GuestSpec, ReduceError> {
    refuse_hooks(&spec)?;
    spec.set_hooks(None);
    let injected = take_injected(&mut spec)?;
    let netns = take_network_namespace(&mut spec)?;
    add_cgroup_namespace(&mut spec);
    if let Some(linux) = spec.linux_mut() {
        // The guest has one cgroup tree and no security modules; the host's names mean nothing there.
        linux.set_cgroups_path(Some(Path::new("/machinen").join(id)));
        linux.set_mount_label(None);
    }
    if let Some(process) = spec.process_mut() {
        drop_labels(process);
    }
    Ok(GuestSpec { spec, injected, netns })
}

/// The guest has no security modules; the host's names mean nothing there.
pub(super) fn drop_labels(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

fn refuse_hooks(spec: &Spec) -> Result<(), ReduceError> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let kinds = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    match kinds.into_iter().find(|(_, hooks)| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty())) {
        Some((hook, _)) => Err(ReduceError::Hook { hook }),
        None => Ok(()),
    }
}

fn take_injected(spec: &mut Spec) -> Result<Vec<Injected>, ReduceError> {
    let mut injected = Vec::new();
    let mut kept = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination();
        if !destination.is_absolute() {
            return Err(ReduceError::RelativeDestination { destination: destination.clone() });
        }
        if is_bind(mount) {
            let source = mount.source().clone().unwrap_or_default();
            match destination.to_str().filter(|path| INJECTED.contains(path) && source == Path::new(path)) {
                Some(path) => injected.push(Injected { source, destination: path.to_owned() }),
                None => {
                    return Err(ReduceError::Bind { destination: destination.clone(), source_path: source });
                }
            }
            continue;
        }
        let kind = mount.typ().clone().unwrap_or_default();
        if !GUEST_KINDS.contains(&kind.as_str()) {
            return Err(ReduceError::MountKind { destination: destination.clone(), kind });
        }
        kept.push(mount.clone());
    }
    spec.set_mounts(Some(kept));
    Ok(injected)
}

/// runc's rule: the type `bind`, or a `bind`/`rbind` option with any type.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// Removes the network namespace: inside the guest, containers share the VM's, which is the pod's.
fn take_network_namespace(spec: &mut Spec) -> Result<Option<PathBuf>, ReduceError> {
    let Some(linux) = spec.linux_mut() else { return Ok(None) };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut netns = None;
    for namespace in &namespaces {
        match (namespace.typ(), namespace.path()) {
            (LinuxNamespaceType::Network, path) => netns = path.clone(),
            (kind, Some(path)) => {
                return Err(ReduceError::SharedNamespace { kind, path: path.clone() });
            }
            (_, None) => {}
        }
    }
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    linux.set_namespaces(Some(namespaces));
    Ok(netns)
}

/// Gives a container for which cgroups are mounted a cgroup namespace, whether the configuration has one or not.
///
/// On a host with cgroup v1 clients ask for none, since that mount shows a container its own groups there. The guest has
/// version 2 only, where the same configuration would show the VM's root: programs find no limits in it, and a privileged
/// container that makes groups below (as dockerd's usual start does) would leave its own, with its limits.
fn add_cgroup_namespace(spec: &mut Spec) {
    let mut kinds = spec.mounts().iter().flatten().filter_map(|mount| mount.typ().as_deref());
    if !kinds.any(|kind| ["cgroup", "cgroup2"].contains(&kind)) {
        return;
    }
    let Some(linux) = spec.linux_mut() else { return };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    if namespaces.iter().all(|namespace| namespace.typ() != LinuxNamespaceType::Cgroup) {
        let mut own = LinuxNamespace::default();
        own.set_typ(LinuxNamespaceType::Cgroup);
        namespaces.push(own);
        linux.set_namespaces(Some(namespaces));
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{
        HookBuilder, HooksBuilder, LinuxNamespaceBuilder, MountBuilder, get_default_mounts,
        get_default_namespaces,
    };

    use super::*;

    fn bind(destination: &str, source: &str) -> Mount {
        MountBuilder::default()
            .destination(destination)
            .typ("bind")
            .source(source)
            .options(vec!["rbind".to_owned(), "ro".to_owned()])
            .build()
            .unwrap()
    }

    #[test]
    fn the_default_configuration_is_kept_but_for_the_hosts_part() {
        let reduced = reduce(Spec::default(), "c1").unwrap();
        assert_eq!(reduced.spec.mounts(), &Some(get_default_mounts()));
        let linux = reduced.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/machinen/c1")));
        let kinds: Vec<_> =
            linux.namespaces().as_ref().unwrap().iter().map(|namespace| namespace.typ()).collect();
        assert!(!kinds.contains(&LinuxNamespaceType::Network));
        assert_eq!(kinds.len(), get_default_namespaces().len() - 1);
    }

    #[test]
    fn where_cgroups_are_mounted_there_is_a_cgroup_namespace() {
        let kinds = |given: &[LinuxNamespaceType], mounted: &str| {
            let namespaces =
                given.iter().map(|&kind| LinuxNamespaceBuilder::default().typ(kind).build().unwrap());
            let mut spec = Spec::default();
            spec.linux_mut().as_mut().unwrap().set_namespaces(Some(namespaces.collect()));
            let mount = MountBuilder::default().destination("/sys/fs/cgroup").typ(mounted).build().unwrap();
            spec.set_mounts(Some(vec![mount]));
            let reduced = reduce(spec, "c1").unwrap().spec;
            let namespaces = reduced.linux().as_ref().unwrap().namespaces().clone().unwrap();
            namespaces.iter().map(LinuxNamespace::typ).collect::<Vec<_>>()
        };
        let (pid, cgroup) = (LinuxNamespaceType::Pid, LinuxNamespaceType::Cgroup);
        assert_eq!(kinds(&[pid], "cgroup"), [pid, cgroup]);
        assert_eq!(kinds(&[pid], "cgroup2"), [pid, cgroup]);
        assert_eq!(kinds(&[cgroup, pid], "cgroup"), [cgroup, pid]);
        assert_eq!(kinds(&[pid], "tmpfs"), [pid]);
    }

    #[test]
    fn a_bind_mount_is_refused_by_name() {
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![bind("/data", "/srv/data")]));
        let error = reduce(spec, "c1").unwrap_err();
        assert_eq!(
            error.to_string(),
            "mount /data of the host path /srv/data is not supported yet (bind mounts come with volumes)"
        );
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
    }

    #[test]
    fn the_two_files_of_host_networking_are_injected() {
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![
            bind("/etc/hosts", "/etc/hosts"),
            bind("/etc/resolv.conf", "/etc/resolv.conf"),
        ]));
        let reduced = reduce(spec, "c1").unwrap();
        assert_eq!(reduced.injected.len(), 2);
        assert_eq!(reduced.spec.mounts(), &Some(vec![]));
    }

    #[test]
    fn namespaces_by_path_are_the_hosts_network_or_refused() {
        let with = |kind, path: &str| {
            let mut spec = Spec::default();
            let namespace = LinuxNamespaceBuilder::default().typ(kind).path(path).build().unwrap();
            spec.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![namespace]));
            reduce(spec, "c1")
        };
        let reduced = with(LinuxNamespaceType::Network, "/run/netns/a").unwrap();
        assert_eq!(reduced.netns.as_deref(), Some(Path::new("/run/netns/a")));
        assert!(matches!(
            with(LinuxNamespaceType::Pid, "/proc/1/ns/pid"),
            Err(ReduceError::SharedNamespace { .. })
        ));
    }

    #[test]
    fn hooks_are_refused() {
        let mut spec = Spec::default();
        let hook = HookBuilder::default().path("/bin/true").build().unwrap();
        spec.set_hooks(Some(HooksBuilder::default().create_runtime(vec![hook]).build().unwrap()));
        assert_eq!(reduce(spec, "c1").unwrap_err(), ReduceError::Hook { hook: "createRuntime" });
    }
}
