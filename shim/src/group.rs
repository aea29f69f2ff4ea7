//! Which server a container belongs to: that of its pod, or one of its own.
//!
//! containerd's CRI plugin starts a shim for each container of a pod, and names the pod's sandbox in an annotation
//! (containerd, pkg/cri/annotations). All of them are served by the sandbox's server, in the sandbox's VM. The same holds
//! for a container that names a namespace of another one by its process, as Docker does for `--network container:X`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use machinen::spec::bundle;

use crate::start::{ADDRESS_FILE, PID_FILE, POD_FILE};

/// The annotation that names the sandbox of a container.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// The id of the sandbox whose server serves the container `id`. None: it has a server of its own, as the sandbox itself.
///
/// A configuration that is not valid is reported when the container is created.
pub(crate) fn sandbox_of(id: &str, bundle: &Path) -> Option<String> {
    let spec = bundle::load(bundle).ok()?;
    let sandbox = spec.annotations().as_ref()?.get(SANDBOX)?;
    (sandbox != id).then(|| sandbox.clone())
}

/// A container that has a server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ServedContainer {
    pub(crate) id: String,
    /// The server's socket.
    pub(crate) socket: PathBuf,
}

/// The container of which the configuration in the bundle names a namespace by its process (`/proc/PID/ns/net`), if that is
/// one of machinen's. Its bundle is next to this one.
pub(crate) fn owner_of_namespaces(bundle: &Path) -> Option<ServedContainer> {
    let spec = bundle::load(bundle).ok()?;
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?.iter();
    let processes = namespaces.filter_map(|namespace| process_of(namespace.path().as_deref()?));
    // The process that stands for a container is a child of its server.
    let servers: Vec<_> = processes.filter_map(parent).collect();
    let others = fs::read_dir(bundle.parent()?).ok()?.flatten().map(|entry| entry.path());
    others.filter(|other| other != bundle).find_map(|other| {
        let read = |name| fs::read_to_string(other.join(name)).ok();
        let server = read(PID_FILE)?.trim().parse().ok()?;
        let address = servers.contains(&server).then(|| read(ADDRESS_FILE)).flatten()?;
        let socket = address.trim().strip_prefix("unix://")?.into();
        Some(ServedContainer { id: other.file_name()?.to_str()?.to_owned(), socket })
    })
}

/// Whether the server of the container `id` serves others, whose bundles are next to this one.
pub(crate) fn serves_others(id: &str, bundle: &Path) -> bool {
    let others = bundle.parent().and_then(|dir| fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    let names_it = |other: &Path| fs::read_to_string(other.join(POD_FILE)).is_ok_and(|pod| pod == id);
    others.map(|entry| entry.path()).any(|other| other != bundle && names_it(&other))
}

/// The pid in the path of a process's namespace.
fn process_of(namespace: &Path) -> Option<u32> {
    let mut parts = namespace.strip_prefix("/proc").ok()?.components();
    parts.next()?.as_os_str().to_str()?.parse().ok()
}

fn parent(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name is in parentheses and may have any character.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_sandbox_has_a_server_of_its_own_and_its_containers_have_that() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = |annotations: serde_json::Value| {
            let config = json!({
                "ociVersion": "1.2.0", "process": {"args": ["sh"], "cwd": "/"}, "root": {"path": "rootfs"},
                "annotations": annotations,
            });
            fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            sandbox_of("c1", dir.path())
        };
        assert_eq!(sandbox(json!({})), None);
        assert_eq!(sandbox(json!({"io.kubernetes.cri.sandbox-id": "c1"})), None);
        assert_eq!(sandbox(json!({"io.kubernetes.cri.sandbox-id": "s"})).as_deref(), Some("s"));
        fs::remove_file(dir.path().join("config.json")).unwrap();
        assert_eq!(sandbox_of("c1", dir.path()), None);
    }
    #[test]
    fn a_namespace_of_a_servers_child_leads_to_that_server() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (dir.path().join("y"), dir.path().join("x"));
        for dir in [&ours, &other] {
            fs::create_dir(dir).unwrap();
        }
        let names = |path: String| {
            let config = json!({
                "ociVersion": "1.2.0", "process": {"args": ["sh"], "cwd": "/"}, "root": {"path": "rootfs"},
                "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": path}]},
            });
            fs::write(ours.join("config.json"), config.to_string()).unwrap();
            owner_of_namespaces(&ours)
        };
        let own = std::process::id();
        assert_eq!(names(format!("/proc/{own}/ns/net")), None, "it is the child of no server");
        fs::write(other.join(PID_FILE), parent(own).unwrap().to_string()).unwrap();
        fs::write(other.join(ADDRESS_FILE), "unix:///run/s").unwrap();
        let found = ServedContainer { id: "x".to_owned(), socket: "/run/s".into() };
        assert_eq!(names(format!("/proc/{own}/ns/net")), Some(found));
        assert_eq!(names("/run/netns/a".to_owned()), None);
        assert!(!serves_others("x", &other));
        fs::write(ours.join(POD_FILE), "x").unwrap();
        assert!(serves_others("x", &other) && !serves_others("y", &ours));
    }
}
