//! A pod, made and removed as kubelet does.

use std::{collections::HashMap, fs, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};

use super::{Client, Container, Handler, Refusal, api, node::Shared};
use crate::inventory;

/// A running pod. Dropped without [`Pod::remove`] it stays until its node ends.
#[derive(Debug)]
pub struct Pod {
    pub(super) node: Arc<Shared>,
    pub(super) config: api::PodSandboxConfig,
    id: String,
}

impl Pod {
    pub(super) fn request(
        node: &Shared,
        handler: Handler,
        change: impl FnOnce(&mut api::PodSandboxConfig),
    ) -> Result<api::RunPodSandboxRequest> {
        let mut config = config(node, node.number());
        change(&mut config);
        fs::create_dir_all(&config.log_directory)?;
        Ok(api::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.name().to_owned() })
    }

    pub(super) fn run(
        node: Arc<Shared>,
        handler: Handler,
        change: impl FnOnce(&mut api::PodSandboxConfig),
    ) -> Result<Self> {
        let request = Self::request(&node, handler, change)?;
        let config = request.config.clone().unwrap_or_default();
        let id = node.client.run_pod_sandbox(request)?.pod_sandbox_id;
        node.pods.lock().expect("the lock is not poisoned").push(id.clone());
        Ok(Self { node, config, id })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn client(&self) -> &Client {
        &self.node.client
    }

    /// The directory of the logs of the pod's containers.
    pub fn logs(&self) -> PathBuf {
        PathBuf::from(&self.config.log_directory)
    }

    /// A directory for files that the test gives the pod's containers.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn dir(&self) -> Result<PathBuf> {
        let name = self.config.metadata.clone().unwrap_or_default().uid;
        let dir = self.node.root.join("volumes").join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn status(&self) -> Result<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        self.client().pod_sandbox_status(request)?.status.context("no status")
    }

    /// The pod's address.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self) -> Result<String> {
        let network = self.status()?.network.context("no network")?;
        Ok(network.ip)
    }

    /// Creates a container that runs a command.
    ///
    /// # Errors
    /// containerd refuses it.
    pub fn create(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut api::ContainerConfig),
    ) -> Result<Container<'_>> {
        Container::create(self, name, command, change)
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// containerd refuses one of the two.
    pub fn start(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut api::ContainerConfig),
    ) -> Result<Container<'_>> {
        let container = self.create(name, command, change)?;
        container.start()?;
        Ok(container)
    }

    /// Starts a container that only waits.
    ///
    /// # Errors
    /// containerd refuses it.
    pub fn idle(&self, name: &str) -> Result<Container<'_>> {
        self.start(name, &["sleep", "100000"], |_| ())
    }

    /// # Errors
    /// containerd refuses the call.
    pub fn stop(&self) -> Result<(), Refusal> {
        let request = api::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.client().stop_pod_sandbox(request).map(drop)
    }

    /// Stops and removes the pod, with its containers and its control groups.
    ///
    /// # Errors
    /// containerd refuses one of the two.
    pub fn remove(&self) -> Result<()> {
        self.stop()?;
        self.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() })?;
        // Runtimes remove the groups of their containers, and kubelet that of the pod.
        let group = self.config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
        inventory::remove_cgroups(group.trim_start_matches('/'))
    }
}

/// As kubelet fills it in for a pod without special wishes.
fn config(node: &Shared, number: u32) -> api::PodSandboxConfig {
    let (name, uid) = (format!("pod-{number}"), format!("{}-{number}", node.group));
    let namespaces = api::NamespaceOption {
        network: api::NamespaceMode::Pod.into(),
        pid: api::NamespaceMode::Container.into(),
        ipc: api::NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let security = api::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces),
        seccomp: Some(runtime_default()),
        ..Default::default()
    };
    let labels = HashMap::from([
        ("io.kubernetes.pod.name".to_owned(), name.clone()),
        ("io.kubernetes.pod.namespace".to_owned(), "default".to_owned()),
        ("io.kubernetes.pod.uid".to_owned(), uid.clone()),
    ]);
    api::PodSandboxConfig {
        hostname: name.clone(),
        log_directory: node.root.join("logs").join(&uid).display().to_string(),
        dns_config: Some(api::DnsConfig {
            servers: vec!["10.96.0.10".to_owned()],
            searches: vec!["default.svc.cluster.local".to_owned(), "svc.cluster.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        }),
        linux: Some(api::LinuxPodSandboxConfig {
            cgroup_parent: format!("/{}/pod{uid}", node.group),
            security_context: Some(security),
            ..Default::default()
        }),
        metadata: Some(api::PodSandboxMetadata { name, uid, namespace: "default".to_owned(), attempt: 0 }),
        labels,
        ..Default::default()
    }
}

/// The seccomp profile of Kubernetes' RuntimeDefault.
pub(super) fn runtime_default() -> api::SecurityProfile {
    api::SecurityProfile {
        profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
        ..Default::default()
    }
}
