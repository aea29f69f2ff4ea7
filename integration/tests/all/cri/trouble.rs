//! What goes wrong on a node while a pod is made: each time there is a reason that names the thing, nothing is left, and the
//! next try works.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use machinen_integration::{
    cri::{Container, Node, Refusal, api, eventually},
    setup::{Setup, Value},
};

use super::{both_runtimes, pod_tests};

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [
        a_network_that_fails_half_way, a_volume_that_vanished, a_pod_without_its_kubelet, a_container_without_its_kubelet,
        a_handler_that_is_not_configured,
    ],
}

pod_tests! {
    memory_machinen(V2_1, Machinen): [a_node_without_memory];
    memory_sandbox(V2_1, MachinenSandbox): [a_node_without_memory];
}

/// Milliseconds until the client is gone. A pod of machinen takes some hundred, longer on a busy host.
const MOMENTS: [u64; 9] = [0, 5, 20, 60, 120, 250, 500, 900, 1500];

/// The first plugin has made the interface and reserved an address when the second one fails.
fn a_network_that_fails_half_way(node: &mut Node) -> Result<()> {
    let file = node.containerd().root().join("cni/conf/10-pods.conflist");
    let works = fs::read_to_string(&file)?;
    let broken = works.replace("\"portmap\"", "\"no-such-plugin\"");
    ensure!(broken != works, "{works}");
    let configure = |text: &str, plugin: &str| -> Result<()> {
        fs::write(&file, text)?;
        eventually("containerd has read the network's configuration", || {
            let info = node.client().status(api::StatusRequest { verbose: true })?.info;
            Ok(info.get("cniconfig").is_some_and(|text| text.contains(plugin)).then_some(()))
        })
    };
    configure(&broken, "no-such-plugin")?;
    for _ in 0..2 {
        let Err(refusal) = node.pod(|_| ()) else { bail!("a pod has a network that cannot be made") };
        ensure!(format!("{refusal:#}").contains("no-such-plugin"), "{refusal:#}");
        node.remove_all_pods()?;
        // The library of CNI asks the plugins in the reverse order to undo, and stops at the missing one. So the address
        // stays reserved with every runtime, until the administrator removes it.
        node.free_addresses()?;
        node.settle()?;
    }
    configure(&works, "portmap")?;
    let pod = node.pod(|_| ())?;
    pod.idle("main")?;
    pod.remove()
}

/// A RuntimeClass whose handler this node's containerd does not have.
fn a_handler_that_is_not_configured(node: &mut Node) -> Result<()> {
    for _ in 0..2 {
        let mut request = node.pod_request()?;
        "no-such-handler".clone_into(&mut request.runtime_handler);
        let Err(refusal) = node.client().run_pod_sandbox(request) else { bail!("a pod has no handler") };
        ensure!(refusal.message.contains("no-such-handler"), "{refusal}");
        node.remove_all_pods()?;
        node.settle()?;
    }
    let pod = node.pod(|_| ())?;
    pod.idle("main")?;
    pod.remove()
}

/// The node keeps more memory free than it has left.
fn a_node_without_memory(node: &mut Node) -> Result<()> {
    let full = Setup::new().set("vm", "memory_reserve_percent", Value::number(100));
    node.containerd().configure(&full)?;
    for _ in 0..2 {
        let Err(refusal) = node.pod(|_| ()) else { bail!("a pod has memory that the node does not have") };
        let refusal = format!("{refusal:#}");
        ensure!(refusal.contains("not enough memory on this host for one more VM"), "{refusal}");
        node.remove_all_pods()?;
        node.settle()?;
    }
    node.containerd().configure(&Setup::new())?;
    let pod = node.pod(|_| ())?;
    pod.idle("main")?;
    pod.remove()
}

/// kubelet has made the container, and the volume is gone when it is started. runc says the same by `stat`.
fn a_volume_that_vanished(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let neighbour = pod.idle("neighbour")?;
    let volume = pod.dir()?.join("volume");
    fs::create_dir(&volume)?;
    let with_volume = |config: &mut api::ContainerConfig| {
        config.mounts.push(api::Mount {
            host_path: volume.display().to_string(),
            container_path: "/data".to_owned(),
            ..Default::default()
        });
    };
    let container = pod.create("main", &["sleep", "100000"], with_volume)?;
    fs::remove_dir(&volume)?;
    let Err(refusal) = container.start() else { bail!("a container runs without its volume") };
    ensure!(refusal.message.contains(&volume.display().to_string()), "{refusal}");
    ensure!(refusal.message.to_lowercase().contains("no such file"), "{refusal}");
    container.remove()?;
    fs::create_dir(&volume)?;
    let again = pod.start("main", &["sleep", "100000"], with_volume)?;
    again.shell("touch /data/file")?;
    ensure!(neighbour.runs()? && volume.join("file").exists(), "{:?}", neighbour.status());
    pod.remove()
}

/// kubelet is killed during RunPodSandbox or StopPodSandbox. Another one finds what there is, and removes it.
fn a_pod_without_its_kubelet(node: &mut Node) -> Result<()> {
    let mut restarts = 0;
    for moment in MOMENTS.map(Duration::from_millis) {
        let request = node.pod_request()?;
        // A refusal is as good as no reply: the plugins of the network may be in each other's way after they were
        // interrupted.
        if let Ok(Some(reply)) = node.client().abandon_run_pod_sandbox(request, moment) {
            let stop = api::StopPodSandboxRequest { pod_sandbox_id: reply.pod_sandbox_id };
            node.client().abandon_stop_pod_sandbox(stop, moment / 8)?;
        }
        let removed = |node: &Node| node.remove_all_pods().and_then(|()| node.settle());
        // A runc that was still starting makes the pod's control groups again. kubelet looks for such groups every few
        // seconds.
        if removed(node).is_err() && removed(node).is_err() {
            // As for a container, below.
            restarts += 1;
            node.restart()?;
            removed(node).with_context(|| format!("after {moment:?} and a restart"))?;
        }
    }
    ensure!(restarts <= 2, "{restarts} tasks were forgotten");
    let pod = node.pod(|_| ())?;
    pod.idle("main")?;
    pod.remove()
}

/// The same during StartContainer. The pod and its other container go on.
fn a_container_without_its_kubelet(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let neighbour = pod.idle("neighbour")?;
    let mut restarts = 0;
    for moment in MOMENTS.map(Duration::from_millis) {
        let container = pod.create("main", &["sleep", "100000"], |_| ())?;
        let start = api::StartContainerRequest { container_id: container.id().to_owned() };
        node.client().abandon_start_container(start, moment)?;
        if let Err(refusal) = removed(&container)? {
            // containerd forgets the task if it is interrupted between its Create and its next call (`failed to get task
            // pid`), with every runtime, and finds it when it starts again.
            ensure!(refusal.message.contains("cannot delete running task"), "after {moment:?}: {refusal}");
            restarts += 1;
            node.restart()?;
            removed(&container)?.with_context(|| format!("after {moment:?} and a restart"))?;
        }
        ensure!(neighbour.shell("echo here")? == "here\n", "the neighbour is gone after {moment:?}");
    }
    let again = pod.idle("main")?;
    ensure!(again.shell("echo here")? == "here\n", "{:?}", again.status());
    ensure!(restarts <= 2, "{restarts} tasks were forgotten");
    pod.remove()
}

/// Removes a container that may still be starting, as kubelet does: again and again, for some seconds.
fn removed(container: &Container<'_>) -> Result<Result<(), Refusal>> {
    let mut tries = 0;
    eventually("the container is removed or lost", || {
        tries += 1;
        match container.stop(0).and_then(|()| container.remove()) {
            Ok(()) => Ok(Some(Ok(()))),
            Err(refusal) if tries >= 100 => Ok(Some(Err(refusal))),
            Err(_) => Ok(None),
        }
    })
}
