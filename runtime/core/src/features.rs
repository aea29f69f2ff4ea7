//! What this runtime supports, as a document of the runtime-spec.

use machinen_base::error::chain;
use serde_json::json;

use crate::{
    host_cgroup::HostCgroups,
    spec::{CAPABILITIES, OCI_VERSION},
};

/// The options of mounts that the guest's engine and the agent know; others are data of the file system.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ridmap",
    "ro",
    "rprivate",
    "rro",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "tmpcopyup",
];

/// The features document (runtime-spec, features.md): the features of the guest's kernel and engine.
pub fn document() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "capabilities": CAPABILITIES.as_slice(),
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        },
        "annotations": { "io.machinen.host.cgroup": host_cgroups() }
    })
}

/// What can limit a pod on the host, in words.
fn host_cgroups() -> String {
    HostCgroups::detect().map_or_else(|error| chain(&error), |found| found.to_string())
}
