//! One pod's life as kubelet plays it: the calls in kubelet's order, from the pod's sandbox to its removal.
//!
//! What only kubelet decides is played as it decides it here: which container is next, when a probe is due, and how long
//! it waits before a restart (not at all).

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::cri::{Container, Node, Pod, api, eventually};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [a_pods_life],
    newest: [],
}

/// Each step appends its name to a file of a volume that all containers of the pod have.
const ORDER: [&str; 13] = [
    "init",
    "sidecar",
    "startup probe of sidecar",
    "main",
    "postStart",
    "ready",
    "crash",
    "main",
    "postStart",
    "ready",
    "preStop",
    "TERM of main",
    "TERM of sidecar",
];

/// Seconds that the pod has to end.
const GRACE: i64 = 30;

fn a_pods_life(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let volume = pod.dir()?;
    let volumes = |config: &mut api::ContainerConfig| {
        config.mounts = vec![api::Mount {
            host_path: volume.display().to_string(),
            container_path: "/pod".to_owned(),
            ..Default::default()
        }];
    };
    let start = |name: &str, script: &str| pod.start(name, &["sh", "-c", script], volumes);

    let init = start("init", "echo init >> /pod/order")?;
    let ended = init.wait()?;
    ensure!(ended.exit_code == 0 && ended.reason == "Completed", "{ended:?}");
    relist(&pod, &[("init", false)])?;

    let sidecar = start("sidecar", &server("sidecar"))?;
    probed(&sidecar, "[ -e /tmp/ready ] && echo startup probe of sidecar >> /pod/order")?;
    let first = start("main", &server("main"))?;
    begun(&first)?;
    relist(&pod, &[("init", false), ("sidecar", true), ("main", true)])?;

    // It crashes. kubelet starts another one in the same pod, and keeps the one that has ended for its log.
    let sandbox = (pod.status()?.created_at, pod.address()?);
    first.shell("echo crash >> /pod/order; touch /tmp/crash")?;
    let ended = first.wait()?;
    ensure!(ended.exit_code == 7 && ended.reason == "Error", "{ended:?}");
    let main = start("main", &server("main"))?;
    begun(&main)?;
    relist(&pod, &[("init", false), ("sidecar", true), ("main", false), ("main", true)])?;
    ensure!((pod.status()?.created_at, pod.address()?) == sandbox, "another sandbox: {:?}", pod.status());
    first.remove()?;

    debugged(&pod, &main)?;
    terminated(&pod, &main, &sidecar)?;
    let order = fs::read_to_string(volume.join("order"))?;
    ensure!(order.lines().eq(ORDER), "{order}");
    Ok(())
}

/// A program that is ready a while after its start, crashes on request, and ends itself on TERM.
fn server(name: &str) -> String {
    format!(
        "echo {name} >> /pod/order; trap 'echo TERM of {name} >> /pod/order; exit 0' TERM; rm -f /tmp/ready; \
         (sleep 0.5; touch /tmp/ready) & while [ ! -e /tmp/crash ]; do sleep 0.1; done; exit 7"
    )
}

/// What kubelet asks of the main container once it has started: the hook, and the probe of its readiness. The hook itself
/// waits for the program, because either may be first (Kubernetes: Container Lifecycle Hooks).
fn begun(main: &Container<'_>) -> Result<()> {
    main.shell(
        "until [ \"$(tail -n 1 /pod/order)\" = main ]; do sleep 0.1; done; echo postStart >> /pod/order",
    )?;
    probed(main, "[ -e /tmp/ready ] && echo ready >> /pod/order")
}

/// Asks until the probe succeeds.
fn probed(container: &Container<'_>, script: &str) -> Result<()> {
    eventually("the probe succeeds", || {
        let reply = container.exec(&["sh", "-c", script], 10)?;
        Ok((reply.exit_code == 0).then_some(()))
    })
}

/// What kubelet asks for every second. `wanted` are the pod's containers in the order of their start, and whether they run.
fn relist(pod: &Pod, wanted: &[(&str, bool)]) -> Result<()> {
    let sandboxes = pod.client().list_pod_sandbox(api::ListPodSandboxRequest::default())?.items;
    ensure!(sandboxes.len() == 1 && sandboxes[0].id == pod.id(), "{sandboxes:?}");
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxReady, "{:?}", pod.status());
    let mut found = pod.client().list_containers(api::ListContainersRequest::default())?.containers;
    found.sort_by_key(|container| container.created_at);
    let seen: Vec<_> = found
        .iter()
        .map(|container| {
            let name = container.metadata.as_ref().map_or("", |metadata| &metadata.name);
            (name, container.state() == api::ContainerState::ContainerRunning)
        })
        .collect();
    ensure!(seen == wanted, "{seen:?}");
    let stats = pod.client().list_container_stats(api::ListContainerStatsRequest::default())?.stats;
    let running = wanted.iter().filter(|(_, runs)| *runs).count();
    ensure!(stats.len() >= running, "{stats:?}");
    Ok(())
}

/// An ephemeral container sees the processes of its target, and leaves them alone.
fn debugged(pod: &Pod, main: &Container<'_>) -> Result<()> {
    let debugger = pod.start("debugger", &["sh", "-c", "pidof sleep > /dev/null; ps"], |config| {
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        security.expect("the container has a security context").namespace_options =
            Some(api::NamespaceOption {
                pid: api::NamespaceMode::Target.into(),
                target_id: main.id().to_owned(),
                ..Default::default()
            });
    })?;
    ensure!(debugger.wait()?.exit_code == 0, "{:?}", debugger.status());
    let shown: String = debugger.log()?.into_iter().map(|line| line.text + "\n").collect();
    ensure!(shown.contains("TERM of main"), "{shown}");
    ensure!(main.runs()?, "{:?}", main.status());
    Ok(())
}

/// The main container first, then the sidecar, then the sandbox. kubelet repeats what it has asked for until it sees that all
/// have ended, and collects them later.
fn terminated(pod: &Pod, main: &Container<'_>, sidecar: &Container<'_>) -> Result<()> {
    main.shell("echo preStop >> /pod/order")?;
    for container in [main, sidecar] {
        container.stop(GRACE)?;
        container.stop(GRACE)?;
        let ended = container.wait()?;
        ensure!(ended.exit_code == 0 && ended.reason == "Completed", "{ended:?}");
    }
    pod.stop()?;
    pod.stop()?;
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxNotready, "{:?}", pod.status());
    let left = pod.client().list_containers(api::ListContainersRequest::default())?.containers;
    for container in left {
        let request = || api::RemoveContainerRequest { container_id: container.id.clone() };
        pod.client().remove_container(request())?;
        pod.client().remove_container(request())?;
    }
    pod.remove()?;
    pod.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod.id().to_owned() })?;
    Ok(())
}
