//! containerd starts again while pods run.

use anyhow::{Result, ensure};
use machinen_integration::cri::{Node, api};

use super::both_runtimes;

both_runtimes! {
    every: [pods_outlive_containerd],
    oldest_and_newest: [],
    newest: [],
}

fn pods_outlive_containerd(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let script = "echo first; until [ -e /dev/shm/go ]; do sleep 0.1; done; echo second; exit 4";
    let ends = pod.start("ends", &["sh", "-c", script], |_| ())?;
    let stays = pod.idle("stays")?;
    let before = [ends.status()?.started_at, stays.status()?.started_at];
    ends.wait_for_log("first")?;
    node.restart()?;
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxReady, "{:?}", pod.status());
    let after = [ends.status()?, stays.status()?];
    for (status, before) in after.iter().zip(before) {
        let running = status.state() == api::ContainerState::ContainerRunning;
        ensure!(running && status.started_at == before, "{status:?}");
    }
    // Their processes, streams and exit statuses are known again.
    stays.shell("touch /dev/shm/go")?;
    ensure!(ends.wait()?.exit_code == 4, "{:?}", ends.status());
    ends.wait_for_log("second")?;
    let new = pod.idle("new")?;
    ensure!(new.shell("hostname")? == "pod-1\n", "{:?}", new.shell("hostname"));
    pod.remove()
}
