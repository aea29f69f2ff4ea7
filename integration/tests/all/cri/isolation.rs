//! Containers of a pod do not end with each other, and the pod stays without them.

use anyhow::{Result, ensure};
use machinen_integration::cri::{Node, api};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [out_of_memory],
    newest: [a_crash_leaves_the_neighbour_alone, a_pod_without_containers_takes_new_ones],
}

fn a_crash_leaves_the_neighbour_alone(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let neighbour = pod.idle("neighbour")?;
    let started = neighbour.status()?.started_at;
    let crash = pod.start("crash", &["sh", "-c", "exit 3"], |_| ())?;
    let status = crash.wait()?;
    ensure!(status.exit_code == 3 && status.reason == "Error", "{status:?}");
    // Restarts in place, by other signals than the neighbour's.
    for (script, code) in [("sh -c 'kill -9 $$'; exit $?", 137), ("true", 0), ("kill -SEGV $$; sleep 1", 0)] {
        let again = pod.start("crash", &["sh", "-c", script], |_| ())?;
        let status = again.wait()?;
        ensure!(status.exit_code == code, "{script}: {status:?}");
        again.remove()?;
    }
    let status = neighbour.status()?;
    ensure!(
        status.state() == api::ContainerState::ContainerRunning && status.started_at == started,
        "{status:?}"
    );
    ensure!(neighbour.shell("echo well")? == "well\n", "the neighbour does not work");
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxReady, "{:?}", pod.status());
    pod.remove()
}

/// All containers have ended, as between an init container and the next one.
fn a_pod_without_containers_takes_new_ones(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let address = pod.address()?;
    for round in ["init-1", "init-2"] {
        let container = pod.start(round, &["sh", "-c", "echo $0 >> /dev/shm/rounds", round], |_| ())?;
        let status = container.wait()?;
        ensure!(status.exit_code == 0 && status.reason == "Completed", "{status:?}");
        container.remove()?;
    }
    let main = pod.idle("main")?;
    // The pod's memory and address are those of its beginning.
    let rounds = main.shell("cat /dev/shm/rounds")?;
    ensure!(rounds == "init-1\ninit-2\n", "{rounds}");
    ensure!(pod.address()? == address, "{:?}", pod.status());
    ensure!(main.shell("ip -o -4 addr show dev eth0")?.contains(&address), "another address inside");
    pod.remove()
}

fn out_of_memory(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let limited = |config: &mut api::ContainerConfig| {
        let resources = config.linux.as_mut().and_then(|linux| linux.resources.as_mut());
        resources.expect("the container has resources").memory_limit_in_bytes = 32 << 20;
    };
    let neighbour = pod.start("neighbour", &["sleep", "100000"], limited)?;
    // tail keeps all of its input, which has no line end.
    let eater = pod.start("eater", &["sh", "-c", "exec tail -n 1 /dev/zero"], limited)?;
    let status = eater.wait()?;
    ensure!(status.exit_code == 137 && status.reason == "OOMKilled", "{status:?}");
    ensure!(neighbour.runs()?, "{:?}", neighbour.status());
    neighbour.stop(0)?;
    let status = neighbour.wait()?;
    ensure!(status.exit_code == 137 && status.reason == "Error", "{status:?}");
    pod.remove()
}
