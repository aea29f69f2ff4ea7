//! The configuration of containerd's plugin CRI and of the pods' network.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result};
use serde_json::json;

use super::node::{OTHER_CONFIGURATION, PAUSE};
use crate::{paths, process::Invocation};

/// The containerd namespace of all that CRI makes.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// Directories below containerd's, in which pods and containers have files.
pub(crate) const DIRS: [&str; 2] = ["s/io.containerd.grpc.v1.cri", "r/io.containerd.grpc.v1.cri"];

/// The directories in them that stay.
pub(crate) const FRAMES: [&str; 6] = [
    "s/io.containerd.grpc.v1.cri/sandboxes",
    "s/io.containerd.grpc.v1.cri/containers",
    "s/io.containerd.grpc.v1.cri/netns",
    "r/io.containerd.grpc.v1.cri/sandboxes",
    "r/io.containerd.grpc.v1.cri/containers",
    "s/io.containerd.grpc.v1.cri",
];

/// A program in a network namespace of its own, whose arguments are still to be added.
pub(crate) fn in_own_network(program: &Path) -> Invocation {
    // Both programs execute the next one, so the pid is that of the last.
    Invocation::new("unshare")
        .args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
        .arg(program)
}

/// Writes the network's configuration, and returns the plugin's part of containerd's. `snapshotter` is that of machinen's
/// pods, if it is not that of all others.
pub(crate) fn configure(root: &Path, name: &str, snapshotter: Option<&str>) -> Result<String> {
    let (cni, cdi) = (root.join("cni"), root.join("cdi"));
    fs::create_dir(&cdi).with_context(|| format!("cannot make {}", cdi.display()))?;
    for dir in ["conf", "state"] {
        fs::create_dir_all(cni.join(dir)).with_context(|| format!("cannot make {}", cni.display()))?;
    }
    // The library of CNI writes its files in a directory of the host, called by this name.
    let network = json!({
        "cniVersion": "1.0.0",
        "name": name,
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": cni.join("state"),
                    "ranges": [[{ "subnet": "10.88.0.0/16" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    fs::write(cni.join("conf/10-pods.conflist"), network.to_string())?;
    let plugins = paths::cni_plugins()?;
    let runc = root.join("runc");
    let other = root.join(OTHER_CONFIGURATION);
    // containerd 2.0 to 2.2 cannot create containers of a handler that has both options and a sandbox of the shim's.
    let named = root.join("other/containerd-shim-machinen-v1");
    fs::create_dir(root.join("other"))?;
    let script =
        format!("#!/bin/sh\nMACHINEN_CONFIG={} exec containerd-shim-machinen-v1 \"$@\"\n", other.display());
    fs::write(&named, script)?;
    fs::set_permissions(&named, PermissionsExt::from_mode(0o755))?;
    let snapshotter = snapshotter.map(|name| format!("snapshotter = {name:?}")).unwrap_or_default();
    // The newest containerd understands the names of the oldest, and 1.6 ignores what it does not know.
    Ok(format!(
        r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
stream_server_address = "127.0.0.1"
stream_server_port = "0"
disable_apparmor = true
enable_cdi = true
cdi_spec_dirs = [{cdi:?}]
# The tests' machine may not have the capability that a lower value needs.
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {plugins:?}
conf_dir = {conf:?}
# Each file is a network, for the pods' interfaces eth0 and eth1.
max_conf_num = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "{}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = {runc:?}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.machinen]
runtime_type = "io.machinen.v1"
pod_annotations = ["io.machinen.*"]
container_annotations = ["io.machinen.*"]
{snapshotter}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.machinen-sandbox]
runtime_type = "io.machinen.v1"
sandboxer = "shim"
pod_annotations = ["io.machinen.*"]
container_annotations = ["io.machinen.*"]
{snapshotter}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.machinen-other]
runtime_type = "io.machinen.v1"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.machinen-other.options]
ConfigPath = {other:?}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.machinen-sandbox-other]
runtime_type = {named:?}
sandboxer = "shim"
"#,
        paths::RUNC,
        conf = cni.join("conf"),
    ))
}
