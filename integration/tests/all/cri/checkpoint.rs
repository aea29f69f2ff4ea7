//! `CheckpointContainer`, which containerd has since 2.0.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Handler, IMAGE, Node, api},
    paths::{self, Version},
    setup::Setup,
};

use crate::checkpoint::inspect::tool;

mod runc {
    #[test]
    fn a_checkpoint_leaves_the_container_running() {
        super::run(machinen_integration::cri::Handler::Runc);
    }
}
mod machinen {
    #[test]
    fn a_checkpoint_leaves_the_container_running() {
        super::run(machinen_integration::cri::Handler::Machinen);
    }
}
mod sandbox {
    #[test]
    fn a_checkpoint_leaves_the_container_running() {
        super::run(machinen_integration::cri::Handler::MachinenSandbox);
    }
}

/// containerd asks for CRIU on the node, whatever the runtime uses.
fn run(handler: Handler) {
    let criu = paths::workspace().join("target/tools/criu/bin");
    super::run_with(Version::V2_1, handler, &Setup::new().programs(&criu), checkpoint);
}

fn checkpoint(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let script = "echo kept > /tmp/kept; echo ready; while :; do sleep 0.1; done";
    let container = pod.start("main", &["sh", "-c", script], |_| ())?;
    container.wait_for_log("ready")?;
    let archive = pod.dir()?.join("checkpoint.tar");
    let request = api::CheckpointContainerRequest {
        container_id: container.id().to_owned(),
        location: archive.display().to_string(),
        timeout: 100,
    };
    pod.client().checkpoint_container(request)?;
    ensure!(container.runs()?, "{:?}", container.status());
    ensure!(container.shell("cat /tmp/kept")? == "kept\n", "the container does not work");
    let mut names = Vec::new();
    for entry in tar::Archive::new(File::open(&archive)?).entries()? {
        names.push(entry?.path()?.to_str().context("odd name")?.to_owned());
    }
    for wanted in ["config.dump", "spec.dump", "rootfs-diff.tar", "checkpoint/"] {
        ensure!(names.iter().any(|name| name.starts_with(wanted)), "no {wanted} in {names:?}");
    }
    // It is listed by the path in a directory, and only regular files can be in it.
    let flat = |name: &&String| name.strip_prefix("checkpoint/").is_some_and(|name| name.contains('/'));
    ensure!(!names.iter().any(|name| flat(&name)), "{names:?}");
    // containerd puts the statistics where this program looks for them with runc only.
    let parts: &[_] =
        if node.handler() == Handler::Runc { &["--all"] } else { &["--ps-tree", "--files", "--mounts"] };
    let shown =
        tool("checkpointctl").arg("inspect").args(parts.iter().copied()).arg(&archive).run()?.ok()?.text();
    for word in ["main", IMAGE, "containerd", "Process tree", "sh", "/dev/null"] {
        ensure!(shown.contains(word), "no {word:?} in\n{shown}");
    }
    pod.remove()
}
