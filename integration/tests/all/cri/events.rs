//! CRI's events of containers, by which a kubelet with the feature EventedPLEG learns of changes, and the metrics that
//! containerd has. containerd makes both of what the runtime reports, so they are the same with every runtime.

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Node, api},
    paths::Version,
};

use super::both_runtimes;
use api::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
    ContainerStoppedEvent as Stopped,
};

both_runtimes! {
    every: [],
    oldest_and_newest: [],
    newest: [events_of_a_pods_life, metrics_that_containerd_lacks],
}

/// A container ends by itself, another one is stopped, and the pod is removed.
fn events_of_a_pods_life(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let ends = pod.start("ends", &["sh", "-c", "exit 3"], |_| ())?;
    ensure!(ends.wait()?.exit_code == 3, "{:?}", ends.status());
    let stopped = pod.idle("stopped")?;
    stopped.stop(0)?;
    ends.remove()?;
    stopped.remove()?;
    let (sandbox, ids) = (pod.id().to_owned(), [ends.id().to_owned(), stopped.id().to_owned()]);
    pod.remove()?;

    let events = node
        .client()
        .container_events(|event| event.container_id == sandbox && event.container_event_type() == Deleted)?;
    let of = |id: &str| -> Vec<_> {
        let own = events.iter().filter(|event| event.container_id == id);
        own.map(api::ContainerEventResponse::container_event_type).collect()
    };
    for id in ids.iter().chain([&sandbox]) {
        ensure!(of(id) == [Created, Started, Stopped, Deleted], "{id}: {:?}", of(id));
    }
    ensure!(events.len() == 12, "{} events", events.len());
    // An event has the state of the pod and of its containers at that time.
    let end =
        events.iter().find(|event| event.container_id == ids[0] && event.container_event_type() == Stopped);
    let end = end.context("no end")?;
    let status = end.containers_statuses.iter().find(|status| status.id == ids[0]).context("no status")?;
    ensure!(status.exit_code == 3 && status.state() == api::ContainerState::ContainerExited, "{status:?}");
    let pod_status = end.pod_sandbox_status.as_ref().context("no status of the pod")?;
    ensure!(pod_status.state() == api::PodSandboxState::SandboxReady, "{pod_status:?}");
    Ok(())
}

/// containerd 2.1 has neither call, so kubelet takes its metrics from the statistics. This test says when that changes.
fn metrics_that_containerd_lacks(node: &mut Node) -> Result<()> {
    ensure!(node.containerd().version() == Version::V2_1, "another containerd");
    let descriptors = node.client().list_metric_descriptors(api::ListMetricDescriptorsRequest {});
    let metrics = node.client().list_pod_sandbox_metrics(api::ListPodSandboxMetricsRequest {});
    for refusal in [descriptors.err(), metrics.err()] {
        let refusal = refusal.context("containerd has metrics now: test them")?;
        ensure!(refusal.message.contains("not implemented"), "{refusal}");
    }
    Ok(())
}
