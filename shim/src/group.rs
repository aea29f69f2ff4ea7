//! Which server a container belongs to: that of its pod, or one of its own.
//!
//! containerd's CRI plugin starts a shim for each container of a pod, and names the pod's sandbox in an annotation
//! (containerd, pkg/cri/annotations). All of them are served by the sandbox's server, in the sandbox's VM.

use std::path::Path;

use machinen::spec::bundle;

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
}
