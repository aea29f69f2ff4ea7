//! Decides everything about a container before anything is changed on the host.

use std::{
    collections::HashMap,
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::fs::{Links, open_regular};
use machinen_protocol::api::InjectedFile;
use machinen_vm::assets::Assets;
use tokio::task::spawn_blocking;

use super::CreateRequest;
use crate::{
    config::{Config, HostNetwork, NetworkConfig, annotations, copies::CopyMount},
    hooks::ContainerHooks,
    network::{self, NetworkError, OutsideNetwork, PacketPath},
    pod::{
        ContainerId, Pod, PodError, copies,
        host_disks::{self, HostDiskError, HostDiskFile},
        namespaces::SharedNamespaces,
        restore::RestorePlan,
        rootfs::{self, RootfsMount, RootfsPlan},
        sandbox::{ContainerLimits, VmRequest},
        volumes,
    },
    shares::Volume,
    spec::{
        bundle,
        guest::{self, GuestSpec, Injected, MAX_INJECTED},
        volumes::VolumeMount,
    },
};

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The network namespace of this process.
const OWN_NETNS: &str = "/proc/self/ns/net";

/// What is decided about a container.
#[derive(Debug, Clone)]
pub(in crate::pod) struct CreatePlan {
    /// With the annotations applied.
    pub(in crate::pod) config: Config,
    annotations: HashMap<String, String>,
    assets: Assets,
    pub(in crate::pod) guest: GuestSpec,
    pub(in crate::pod) rootfs: RootfsPlan,
    pub(in crate::pod) restore: Option<RestorePlan>,
    /// The sources of the volumes.
    pub(in crate::pod) volumes: Vec<Volume>,
    /// The copy mounts, in the order of the checkpoint's.
    pub(in crate::pod) copies: Vec<CopyMount>,
    /// How the container's own network namespace is connected with the outside, if it is.
    pub(super) outside: Option<OutsideNetwork>,
    /// How packets pass between the container's network namespace and its VM.
    pub(super) packet_path: PacketPath,
    /// The block devices of the host.
    pub(in crate::pod) host_disks: Vec<HostDiskFile>,
    pub(super) hooks: ContainerHooks,
    /// The namespaces that the container shares with others of the pod.
    pub(super) namespaces: SharedNamespaces,
}

impl CreatePlan {
    /// What the container requires of its VM.
    pub(in crate::pod) fn vm_request(&self) -> VmRequest {
        VmRequest {
            config: self.config.clone(),
            annotations: self.annotations.clone(),
            assets: self.assets.clone(),
            limits: ContainerLimits::of(&self.guest.spec),
        }
    }

    /// Reads the files of the host that the container gets copies of, in a thread of its own.
    ///
    /// # Errors
    /// A file cannot be read, or is too large.
    pub(in crate::pod) async fn read_injected(&self) -> Result<Vec<InjectedFile>, PodError> {
        let mut injected = self.guest.injected.clone();
        let mut files = Vec::new();
        if self.outside.is_some() && !self.guest.volumes.iter().any(is_resolv_conf) {
            // The host's nameserver may be one that only the host reaches.
            injected.retain(|file| file.destination != RESOLV_CONF);
            files.push(resolv_conf());
        }
        if !injected.is_empty() {
            let read = move || injected.iter().map(read_one).collect::<Result<Vec<_>, _>>();
            files.extend(spawn_blocking(read).await.map_err(PodError::Worker)??);
        }
        Ok(files)
    }

    /// The network namespace that the container's anchor joins; None: one of its own.
    pub(in crate::pod) fn netns(&self) -> Option<PathBuf> {
        self.guest.netns.clone().filter(|_| self.outside.is_none())
    }

    /// Whether the configuration names a network namespace, which other containers may have too.
    pub(super) fn names_netns(&self) -> bool {
        self.netns().is_some()
    }

    /// The host's file that the container has as its /etc/resolv.conf.
    pub(super) fn resolv_conf(&self) -> Option<Arc<OwnedFd>> {
        let mounted = self.guest.volumes.iter().zip(&self.volumes);
        let (_, volume) = mounted.rev().find(|(mount, _)| is_resolv_conf(mount))?;
        volume.is_file.then(|| Arc::clone(&volume.source))
    }
}

/// Where the checkpoint of a restore comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pod) enum CheckpointOrigin {
    /// A client has named its directory.
    Client,
    /// This pod has just written it, and restores it in a VM of its own.
    Pod,
}

impl Pod {
    /// Makes all checks that change nothing on the host or in the guest. They run in a thread of their own: a
    /// file system that a path of the caller leads to may not answer, and must not keep this pod's other requests
    /// waiting.
    pub(in crate::pod) async fn plan(
        &self,
        create: &CreateRequest,
        origin: CheckpointOrigin,
    ) -> Result<CreatePlan, PodError> {
        let pod = self.clone();
        let (id, bundle) = (create.id.clone(), create.bundle.clone());
        let (rootfs, checkpoint) = (create.rootfs.clone(), create.checkpoint.clone());
        let plan =
            move || pod.plan_blocking(&id, &bundle, &rootfs, checkpoint.as_deref().map(|dir| (dir, origin)));
        spawn_blocking(plan).await.map_err(PodError::Worker)?
    }

    fn plan_blocking(
        &self,
        id: &ContainerId,
        bundle: &Path,
        rootfs: &[RootfsMount],
        checkpoint: Option<(&Path, CheckpointOrigin)>,
    ) -> Result<CreatePlan, PodError> {
        let mut spec = bundle::load(bundle)?;
        self.share_sandbox_files(&mut spec, id);
        let annotations = spec.annotations().clone().unwrap_or_default();
        let config = annotations::apply(&self.shared.config, &annotations)?;
        let rootfs = rootfs::plan(rootfs, &spec, bundle)?;
        let guest = guest::reduce(spec, id)?;
        let outside = outside(&config.network, &guest)?;
        let hooks = ContainerHooks::new(guest.hooks.clone(), &guest.spec, id, bundle, annotations.clone());
        let assets = Assets::find(&config.assets.dir)?;
        let restore = checkpoint.map(|(dir, origin)| {
            let restore = RestorePlan::read(id, dir)?;
            if origin == CheckpointOrigin::Client {
                // The container itself is among the pod's by now.
                restore.check_digest(&config.restore, self.containers().len() > 1)?;
            }
            Ok::<_, PodError>(restore)
        });
        let restore = restore.transpose()?;
        let namespaces = self.shared_namespaces(&guest.named, restore.is_some())?;
        let volumes = volumes::open_all(bundle, &guest.volumes)?;
        let host_disks = host_disks::open_all(&guest.disks)?;
        let copies = copies::plan(&config.rootdisk.copies, restore.as_ref())?;
        if let Some(restore) = &restore {
            restore.check_volumes(&volumes)?;
            if let Some(disk) = host_disks.first() {
                return Err(HostDiskError::Restore { path: disk.path.clone() }.into());
            }
        }
        let packet_path = if config.network.routed { PacketPath::Routed } else { PacketPath::Redirected };
        Ok(CreatePlan {
            config,
            annotations,
            assets,
            guest,
            rootfs,
            restore,
            volumes,
            copies,
            outside,
            packet_path,
            host_disks,
            hooks,
            namespaces,
        })
    }
}

/// How the container is connected with the outside, if it is.
///
/// # Errors
/// The configuration asks for the host's own network, or names another one, or there is nothing to be routed to.
fn outside(config: &NetworkConfig, guest: &GuestSpec) -> Result<Option<OutsideNetwork>, PodError> {
    // A path that does not lead to a namespace is reported where it is joined.
    let is_host = |path: &PathBuf| network::same_namespace(OWN_NETNS.as_ref(), Some(path)).unwrap_or(false);
    let wants_host = guest.host_network || guest.netns.as_ref().is_some_and(is_host);
    if config.routed && (wants_host || config.outside) {
        return Err(PodError::Network(NetworkError::NothingToRoute));
    }
    let outside = OutsideNetwork { pasta: config.pasta.clone(), ports: config.ports.clone() };
    match (&guest.netns, config.outside, config.host) {
        (_, true, _) | (_, false, HostNetwork::Pasta) if wants_host => Ok(Some(outside)),
        (_, false, HostNetwork::Refuse) if wants_host => Err(PodError::Network(NetworkError::Host)),
        (Some(path), true, _) => Err(PodError::Network(NetworkError::NamesNamespace { path: path.clone() })),
        (None, true, _) => Ok(Some(outside)),
        (_, false, _) => Ok(None),
    }
}

fn is_resolv_conf(mount: &VolumeMount) -> bool {
    mount.destination == Path::new(RESOLV_CONF)
}

fn resolv_conf() -> InjectedFile {
    let content = format!("nameserver {}\n", network::NAMESERVER).into_bytes();
    InjectedFile { destination: RESOLV_CONF.to_owned(), content, mode: 0o644, ..Default::default() }
}

fn read_one(Injected { source, destination }: &Injected) -> Result<InjectedFile, PodError> {
    let (content, mode) =
        read_small(source).map_err(|error| PodError::Injected { path: source.clone(), source: error })?;
    Ok(InjectedFile { destination: destination.clone(), content, mode, ..Default::default() })
}

/// Reads a file of limited size, and its permissions.
fn read_small(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    let file = open_regular(path, Links::Follow)?;
    let mode = file.metadata()?.mode() & 0o777;
    let mut content = Vec::new();
    file.take(MAX_INJECTED + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_INJECTED {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_INJECTED} bytes")));
    }
    Ok((content, mode))
}
