//! A node: containerd with the images and the network that pods need.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use serde_json::{Value, json};

use super::{Client, Pod, api, eventually};
use crate::{
    containerd::Containerd,
    image::Image,
    inventory::{self, Inventory},
    paths::Version,
    process::Invocation,
    setup::Setup,
};

/// The image of all containers.
pub const IMAGE: &str = "machinen.test/busybox:1";
/// The image of the container that holds a pod's namespaces.
pub(super) const PAUSE: &str = "machinen.test/pause:1";

/// The file in the node's directory that is the configuration of the handlers with one of their own. Nothing makes it.
pub const OTHER_CONFIGURATION: &str = "other.toml";

/// The runtime of a pod, as a RuntimeClass names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    Runc,
    Machinen,
    /// The pod's sandbox is the shim's own, by containerd's Sandbox API (containerd 2).
    MachinenSandbox,
    /// The first two with a configuration of their own ([`OTHER_CONFIGURATION`]), by the handler's options and by a
    /// script that sets `MACHINEN_CONFIG`.
    MachinenOther,
    MachinenSandboxOther,
    /// What the installer of `deploy/` has installed, and what it has installed with a configuration of its own.
    Installed,
    InstalledOther,
}

impl Handler {
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Machinen => "machinen",
            Self::MachinenSandbox => "machinen-sandbox",
            Self::MachinenOther => "machinen-other",
            Self::MachinenSandboxOther => "machinen-sandbox-other",
            Self::Installed => "machinen-installed",
            Self::InstalledOther => "machinen-installed-other",
        }
    }
}

/// A node with one runtime for all of its pods.
#[derive(Debug)]
pub struct Node {
    containerd: Containerd,
    shared: Arc<Shared>,
    before: Inventory,
}

/// What pods need of their node; containerd may be started again while they exist.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) handler: Handler,
    /// The directory of the node's files.
    pub(super) root: PathBuf,
    /// The directory of the control groups.
    pub(super) group: String,
    /// Ids of the pods so far.
    pub(super) pods: Mutex<Vec<String>>,
    numbers: AtomicU32,
}

impl Shared {
    pub(super) fn number(&self) -> u32 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

impl Node {
    /// Starts containerd, and waits until pods can be made.
    ///
    /// # Errors
    /// See [`Containerd::start_with`]; or CRI does not become ready.
    pub fn start(version: Version, handler: Handler, setup: &Setup) -> Result<Self> {
        let containerd = Containerd::start_with(version, &setup.clone().cri())?;
        let shared = Arc::new(Shared {
            client: Client::connect(&containerd.socket())?,
            handler,
            root: containerd.root().to_owned(),
            group: containerd.name().to_owned(),
            pods: Mutex::default(),
            numbers: AtomicU32::new(1),
        });
        let mut node = Self { containerd, shared, before: Inventory::default() };
        node.wait_until_ready()?;
        for image in [Image::busybox()?, Image::busybox()?.running(PAUSE, &["/bin/sleep", "1000000"])] {
            node.import(&image)?;
        }
        node.before = node.containerd.inventory()?;
        Ok(node)
    }

    /// Imports an image, and waits until CRI knows it.
    ///
    /// # Errors
    /// The image cannot be imported.
    pub fn import(&self, image: &Image) -> Result<()> {
        self.containerd.import(image)?;
        let spec = api::ImageSpec { image: image.name().to_owned(), ..Default::default() };
        let request = api::ImageStatusRequest { image: Some(spec), verbose: false };
        eventually("the image is known", || Ok(self.client().image_status(request.clone())?.image)).map(drop)
    }

    fn wait_until_ready(&self) -> Result<()> {
        eventually("CRI and the network are ready", || {
            match self.client().status(api::StatusRequest { verbose: false }) {
                Ok(reply) => {
                    let conditions = reply.status.unwrap_or_default().conditions;
                    Ok(conditions.iter().all(|condition| condition.status).then_some(()))
                }
                // The plugin, or containerd itself, is still starting.
                Err(refusal) if matches!(refusal.code, Code::Unavailable | Code::Unknown) => Ok(None),
                Err(refusal) => Err(refusal.into()),
            }
        })
    }

    /// Kills containerd and starts it again; pods continue to run.
    ///
    /// # Errors
    /// containerd does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.containerd.restart()?;
        self.wait_until_ready()
    }

    /// Runs a pod.
    ///
    /// # Errors
    /// containerd refuses it.
    pub fn pod(&self, change: impl FnOnce(&mut api::PodSandboxConfig)) -> Result<Pod> {
        self.pod_of(self.shared.handler, change)
    }

    /// Runs a pod with another runtime than the node's.
    ///
    /// # Errors
    /// containerd refuses it.
    pub fn pod_of(&self, handler: Handler, change: impl FnOnce(&mut api::PodSandboxConfig)) -> Result<Pod> {
        Pod::run(Arc::clone(&self.shared), handler, change)
    }

    /// The request for another pod.
    ///
    /// # Errors
    /// The directory of its logs cannot be made.
    pub fn pod_request(&self) -> Result<api::RunPodSandboxRequest> {
        Pod::request(&self.shared, self.shared.handler, |_| ())
    }

    /// Stops and removes all pods, again and again until there are none, as kubelet does.
    ///
    /// # Errors
    /// A pod cannot be removed.
    pub fn remove_all_pods(&self) -> Result<()> {
        let mut last = None;
        let removed = eventually("all pods are removed", || {
            let pods = self.client().list_pod_sandbox(api::ListPodSandboxRequest::default())?.items;
            for pod in &pods {
                let id = || pod.id.clone();
                let mut known = self.shared.pods.lock().expect("the lock is not poisoned");
                if !known.contains(&pod.id) {
                    known.push(id());
                }
                let stop = api::StopPodSandboxRequest { pod_sandbox_id: id() };
                let remove = api::RemovePodSandboxRequest { pod_sandbox_id: id() };
                let stopped = self.client().stop_pod_sandbox(stop);
                if let Err(refusal) = stopped.and_then(|_| self.client().remove_pod_sandbox(remove)) {
                    last = Some(refusal);
                }
            }
            Ok(pods.is_empty().then_some(()))
        });
        removed.with_context(|| format!("the last refusal: {last:?}"))?;
        // A server that is ending is still in its group.
        let mut error = None;
        let removed = eventually("the pods' control groups are removed", || {
            error = inventory::remove_cgroups(&self.shared.group).err();
            Ok(error.is_none().then_some(()))
        });
        removed.with_context(|| format!("{error:?}"))
    }

    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    pub fn handler(&self) -> Handler {
        self.shared.handler
    }

    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// A program in the node's network.
    pub fn program(&self, args: &[&str]) -> Invocation {
        let namespace = format!("--net=/proc/{}/ns/net", self.containerd.keeper_pid());
        Invocation::new("nsenter").arg(namespace).args(args.iter().copied())
    }

    /// Where the plugin of addresses writes down which of them pods have (`dataDir`).
    pub fn network_state(&self) -> PathBuf {
        self.containerd.root().join("cni/state")
    }

    /// Replaces the networks of the pods, and waits until containerd has read their lists of plugins. A network's name is
    /// one that no former network had.
    ///
    /// # Errors
    /// A file cannot be written, or containerd does not accept it.
    pub fn set_networks(&self, networks: &[(String, Value)]) -> Result<()> {
        let dir = self.containerd.root().join("cni/conf");
        for entry in fs::read_dir(&dir)? {
            fs::remove_file(entry?.path())?;
        }
        for (place, (name, plugins)) in networks.iter().enumerate() {
            let list = json!({ "cniVersion": "1.0.0", "name": name, "plugins": plugins });
            // containerd does not read a file of this name.
            let new = dir.join("new");
            fs::write(&new, list.to_string())?;
            fs::rename(&new, dir.join(format!("{place}.conflist")))?;
        }
        eventually("containerd has read the networks", || {
            let info = self.client().status(api::StatusRequest { verbose: true })?.info;
            let read: Value = serde_json::from_str(info.get("cniconfig").context("no networks")?)?;
            let read = read["Networks"].as_array().cloned().unwrap_or_default();
            let names = read.iter().filter_map(|network| network["Config"]["Name"].as_str());
            let names: Vec<_> = names.filter(|name| *name != "cni-loopback").collect();
            Ok(names.iter().eq(networks.iter().map(|(name, _)| name)).then_some(()))
        })
    }

    /// Waits until nothing is left of any pod.
    ///
    /// # Errors
    /// Something is left; it is listed.
    pub fn settle(&self) -> Result<()> {
        for pod in self.shared.pods.lock().expect("the lock is not poisoned").iter() {
            self.containerd.note_id(pod);
        }
        self.containerd.settle(&self.before)?;
        let reserved = self.addresses();
        ensure!(reserved.is_empty(), "addresses are still reserved: {reserved:?}");
        Ok(())
    }

    /// The plugin of addresses has a directory for each network, and a file in it for each address that a pod has.
    fn addresses(&self) -> Vec<PathBuf> {
        let entries = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let files = entries(self.network_state()).flat_map(|network| entries(network.path()));
        let is_address = |name: &str| name.parse::<IpAddr>().is_ok();
        let addresses = files.filter(|file| file.file_name().to_str().is_some_and(is_address));
        addresses.map(|file| file.path()).collect()
    }

    /// Frees the addresses of pods that could not get their network, as an administrator does.
    ///
    /// # Errors
    /// There is none, or one cannot be freed.
    pub fn free_addresses(&self) -> Result<()> {
        let reserved = self.addresses();
        ensure!(!reserved.is_empty(), "no address is reserved");
        reserved.into_iter().try_for_each(|file| Ok(fs::remove_file(file)?))
    }
}
