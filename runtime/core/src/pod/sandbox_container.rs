//! The container that stands for a pod whose client makes none for it: it has the namespaces that the pod's containers
//! share, and its anchor is the pod's process on the host.
//!
//! Kubernetes makes such a container of the image `pause`. Where containerd leaves the pod to the runtime (the Sandbox
//! API), there is no image: the root file system is the VM's own, read-only, and the program is part of the guest's agent.
//! Nothing of this container is reported as an event, since no task belongs to it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use machinen_base::{error::chain, fs::FileError};
use machinen_protocol::PAUSE;
use machinen_vm::assets::Assets;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use tokio::task::spawn_blocking;

use super::{
    ContainerId, CreateRequest, Pod, PodError, SignalScope,
    rootfs::RootfsMount,
    sandbox_files::{self, DnsConfig},
    state::ProcessState,
    stats::Stats,
    stdio::ProcessStdio,
};
use crate::config::annotations;

/// The bundle of the container, in the directory of the pod's state.
const BUNDLE: &str = "sandbox";

/// What a client asks of a pod's sandbox.
#[derive(Debug, Clone, Default)]
pub struct SandboxRequest {
    /// The pod's network namespace; empty: the configuration names none, and the sandbox has that of the host.
    pub netns: PathBuf,
    /// The pod's hostname; empty: the guest's own.
    pub hostname: String,
    /// The pod's nameservers.
    pub dns: DnsConfig,
    /// The pod's cgroup on the host, as the kubelet writes it.
    pub cgroup_parent: String,
    /// The kernel's parameters of the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// The pod's annotations.
    pub annotations: HashMap<String, String>,
    /// The kinds of namespaces that the sandbox has, as the runtime specification names them.
    pub namespaces: Vec<&'static str>,
    /// The ids of the pod's user namespace, if it has one.
    pub uid_mappings: Vec<IdMapping>,
    /// The group ids of the pod's user namespace.
    pub gid_mappings: Vec<IdMapping>,
    /// What all containers of the pod may use, bytes; 0: no limit.
    pub memory_bytes: i64,
    /// Processor time in each period, microseconds; 0: no limit.
    pub cpu_quota: i64,
    /// Microseconds.
    pub cpu_period: i64,
}

/// A range of ids of a user namespace (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMapping {
    /// The first id outside.
    pub host: u32,
    /// The first id inside.
    pub container: u32,
    /// How many ids.
    pub size: u32,
}

impl Pod {
    /// Starts the VM and the container that stands for the pod, under the id `id`. Returns the pid of its anchor.
    ///
    /// # Errors
    /// The pod has such a container already, or it cannot be created or started. Nothing is left then.
    pub async fn start_sandbox(&self, id: &ContainerId, request: &SandboxRequest) -> Result<u32, PodError> {
        if self.shared.sandbox_container.set(id.clone()).is_err() {
            return Err(PodError::Exists { id: id.to_string() });
        }
        let started = self.try_start_sandbox(id, request).await;
        // The first failure is the one to report.
        if started.is_err()
            && let Err(error) = self.stop_sandbox().await
        {
            tracing::warn!("{}", chain(&error));
        }
        started
    }

    async fn try_start_sandbox(&self, id: &ContainerId, request: &SandboxRequest) -> Result<u32, PodError> {
        let config = annotations::apply(&self.shared.config, &request.annotations)?;
        let image = Assets::find(&config.assets.dir)?.image;
        let (bundle, text) = (self.shared.state_dir.join(BUNDLE), config_json(id, request).to_string());
        let written = {
            let (bundle, state_dir) = (bundle.clone(), self.shared.state_dir.clone());
            let (hostname, dns) = (request.hostname.clone(), request.dns.clone());
            let write = move || {
                write_bundle(&bundle, &text)?;
                sandbox_files::make(&state_dir, &hostname, &dns)
            };
            spawn_blocking(write).await
        };
        written.map_err(PodError::Worker)?.map_err(PodError::SandboxBundle)?;
        let create = CreateRequest {
            id: id.clone(),
            bundle,
            rootfs: vec![RootfsMount {
                kind: "erofs".to_owned(),
                source: image,
                options: vec!["ro".to_owned()],
            }],
            stdio: ProcessStdio::default(),
            checkpoint: None,
        };
        self.create(create).await?;
        self.start(&id.init()).await
    }

    /// Whether a client has asked for a sandbox, which also has an end of its own.
    pub fn has_sandbox(&self) -> bool {
        self.shared.sandbox_container.get().is_some()
    }

    /// Gives a container the files that all containers of the pod's sandbox have.
    pub(super) fn share_sandbox_files(&self, spec: &mut Spec, id: &ContainerId) {
        if self.shared.sandbox_container.get().is_some_and(|sandbox| sandbox != id) {
            sandbox_files::mount_in(spec, &self.shared.state_dir);
        }
    }

    /// Ends all containers of the pod, that of the sandbox last, and with it the VM. Does nothing if the pod has no sandbox.
    ///
    /// # Errors
    /// A container cannot be ended.
    pub async fn stop_sandbox(&self) -> Result<(), PodError> {
        let Some(sandbox) = self.shared.sandbox_container.get() else { return Ok(()) };
        let mut ids: Vec<_> = self.containers().keys().filter(|id| *id != sandbox).cloned().collect();
        ids.push(sandbox.clone());
        for id in &ids {
            match self.end_container(id).await {
                Ok(()) | Err(PodError::NoContainer { .. } | PodError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        match self.delete(&sandbox.init()).await {
            Ok(_) | Err(PodError::NoContainer { .. }) => {}
            Err(error) => return Err(error),
        }
        self.remove_sandbox_files().await
    }

    /// Removes the files of the pod's sandbox, if there are any.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub(super) async fn remove_sandbox_files(&self) -> Result<(), PodError> {
        let state_dir = self.shared.state_dir.clone();
        let removed = spawn_blocking(move || sandbox_files::remove(&state_dir)).await;
        removed.map_err(PodError::Worker)?.map_err(PodError::SandboxBundle)
    }

    /// What all containers of a pod with a sandbox use, with the limits and the network of the pod.
    ///
    /// # Errors
    /// The pod has no sandbox, or its agent does not answer.
    pub async fn sandbox_stats(&self, id: &ContainerId) -> Result<Stats, PodError> {
        let mut sum = self.stats(id).await?;
        let others: Vec<_> = self.containers().keys().filter(|other| *other != id).cloned().collect();
        for other in others {
            match self.stats(&other).await {
                Ok(stats) => sum.add(stats),
                // It has ended, or is being created.
                Err(error) => tracing::debug!(id = other.as_str(), "not counted: {}", chain(&error)),
            }
        }
        Ok(sum)
    }

    async fn end_container(&self, id: &ContainerId) -> Result<(), PodError> {
        let container = self.container(id)?;
        if !matches!(container.state(), ProcessState::Stopped(_)) {
            self.kill(&SignalScope::All(id.clone()), libc::SIGKILL as u32).await?;
            container.exited().await;
        }
        Ok(())
    }
}

fn write_bundle(bundle: &Path, config: &str) -> Result<(), FileError> {
    fs::create_dir_all(bundle).map_err(FileError::at("create", bundle))?;
    let path = bundle.join("config.json");
    fs::write(&path, config).map_err(FileError::at("write", path))
}

/// The configuration of the container, like that of a pause container (containerd, internal/cri/server/podsandbox).
fn config_json(id: &ContainerId, request: &SandboxRequest) -> Value {
    let namespace = |kind: &&str| match *kind {
        "network" => json!({"type": "network", "path": request.netns}),
        kind => json!({"type": kind}),
    };
    let mapping =
        |ids: &IdMapping| json!({"hostID": ids.host, "containerID": ids.container, "size": ids.size});
    let mount = |kind: &str, destination: &str, options: &[&str]| json!({"type": kind, "source": kind, "destination": destination, "options": options});
    let mut annotations = request.annotations.clone();
    let limits = [
        ("io.kubernetes.cri.sandbox-memory", request.memory_bytes),
        ("io.kubernetes.cri.sandbox-cpu-quota", request.cpu_quota),
        ("io.kubernetes.cri.sandbox-cpu-period", request.cpu_period),
    ];
    annotations.extend(
        limits
            .iter()
            .filter(|(_, value)| *value > 0)
            .map(|(name, value)| ((*name).to_owned(), value.to_string())),
    );
    json!({
        "ociVersion": "1.2.0",
        "hostname": request.hostname,
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "args": [PAUSE],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": {},
            "noNewPrivileges": true,
        },
        "mounts": [
            mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "annotations": annotations,
        "linux": {
            "namespaces": request.namespaces.iter().map(namespace).collect::<Vec<_>>(),
            "uidMappings": request.uid_mappings.iter().map(mapping).collect::<Vec<_>>(),
            "gidMappings": request.gid_mappings.iter().map(mapping).collect::<Vec<_>>(),
            "sysctl": request.sysctls,
            "cgroupsPath": cgroups_path(&request.cgroup_parent, id),
        },
    })
}

/// The cgroup of the container below that of its pod, in systemd's form where the kubelet uses that (the same function of
/// containerd's CRI plugin names the cgroups of the pod's other containers).
fn cgroups_path(parent: &str, id: &ContainerId) -> String {
    match parent.rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_has_the_form_of_its_parent() {
        let id = ContainerId::parse("s").unwrap();
        assert_eq!(cgroups_path("/kubepods/pod1", &id), "/kubepods/pod1/s");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", &id),
            "kubepods-pod1.slice:cri-containerd:s"
        );
    }

    #[test]
    fn the_configuration_has_what_the_pod_asks_for() {
        let request = SandboxRequest {
            netns: "/run/netns/n".into(),
            hostname: "web-0".to_owned(),
            namespaces: vec!["network", "ipc"],
            memory_bytes: 1 << 30,
            ..SandboxRequest::default()
        };
        let config = config_json(&ContainerId::parse("s").unwrap(), &request);
        assert_eq!(config["hostname"], "web-0");
        assert_eq!(
            config["linux"]["namespaces"],
            json!([{"type": "network", "path": "/run/netns/n"}, {"type": "ipc"}])
        );
        assert_eq!(config["annotations"], json!({"io.kubernetes.cri.sandbox-memory": "1073741824"}));
        serde_json::from_value::<Spec>(config).unwrap();
    }
}
