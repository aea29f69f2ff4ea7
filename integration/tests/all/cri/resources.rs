//! What containers use, and what they may use.

use anyhow::{Context, Result, ensure};
use machinen_integration::cri::{Container, Node, Pod, api, eventually};

use super::both_runtimes;

both_runtimes! {
    every: [],
    oldest_and_newest: [statistics],
    newest: [limits_and_their_change],
}

fn stats(pod: &Pod, container: &Container<'_>) -> Result<api::ContainerStats> {
    let request = api::ContainerStatsRequest { container_id: container.id().to_owned() };
    pod.client().container_stats(request)?.stats.context("no statistics")
}

fn statistics(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let idle = pod.idle("idle")?;
    let busy = pod.start(
        "busy",
        &["sh", "-c", "dd if=/dev/zero of=/dev/shm/8m bs=1M count=8; while :; do :; done"],
        |_| (),
    )?;
    let processor = |container: &Container<'_>| -> Result<u64> {
        let cpu = stats(&pod, container)?.cpu.unwrap_or_default();
        Ok(cpu.usage_core_nano_seconds.context("no time of a processor")?.value)
    };
    // The busy one uses more and more, and the idle one no more than its start.
    let (first, idle_first) = (processor(&busy)?, processor(&idle)?);
    let second = eventually("the busy container uses a processor", || {
        Ok(Some(processor(&busy)?).filter(|used| *used > first + 200_000_000))
    })?;
    let (busy_used, idle_used) = (second - first, processor(&idle)? - idle_first);
    ensure!(busy_used > 2 * idle_used, "idle {idle_used}, busy {busy_used}");
    let memory = stats(&pod, &busy)?.memory.unwrap_or_default();
    let set = memory.working_set_bytes.context("no working set")?.value;
    ensure!((100 << 10..1 << 30).contains(&set), "{set} bytes");
    // 1.6 has no statistics of pods.
    if node.containerd().version() == machinen_integration::paths::Version::V2_1 {
        pod_statistics(node, &pod)?;
    }
    pod.remove()
}

fn pod_statistics(node: &Node, pod: &Pod) -> Result<()> {
    let filter = api::PodSandboxStatsFilter { id: pod.id().to_owned(), ..Default::default() };
    let request = api::ListPodSandboxStatsRequest { filter: Some(filter) };
    let found = node.client().list_pod_sandbox_stats(request)?.stats;
    let [stats] = found.as_slice() else { anyhow::bail!("{found:?}") };
    let linux = stats.linux.clone().context("no statistics of Linux")?;
    ensure!(linux.containers.len() == 2, "{linux:?}");
    let network = linux.network.and_then(|network| network.default_interface).context("no network")?;
    ensure!(network.name == "eth0", "{network:?}");
    ensure!(
        linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).is_some_and(|used| used.value > 0),
        "no time"
    );
    ensure!(
        linux.memory.and_then(|memory| memory.working_set_bytes).is_some_and(|set| set.value > 0),
        "no memory"
    );
    Ok(())
}

fn limits_and_their_change(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.start("main", &["sleep", "100000"], |config| {
        let resources = config.linux.as_mut().and_then(|linux| linux.resources.as_mut());
        let resources = resources.expect("the container has resources");
        resources.memory_limit_in_bytes = 64 << 20;
        resources.cpu_period = 100_000;
        resources.cpu_quota = 50_000;
        resources.cpu_shares = 512;
    })?;
    let neighbour = pod.idle("neighbour")?;
    // The names of the files are those of the guest's or of the host's version of control groups.
    let read = |container: &Container<'_>| {
        container.shell(
            "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2> /dev/null; \
             cat cpu.max 2> /dev/null || cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us | tr '\\n' ' '",
        )
    };
    let (before, other) = (read(&container)?, read(&neighbour)?);
    ensure!(before.trim() == format!("{}\n50000 100000", 64 << 20), "{before}");
    let request = api::UpdateContainerResourcesRequest {
        container_id: container.id().to_owned(),
        linux: Some(api::LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20,
            cpu_period: 100_000,
            cpu_quota: 80_000,
            ..Default::default()
        }),
        ..Default::default()
    };
    pod.client().update_container_resources(request)?;
    let after = read(&container)?;
    ensure!(after.trim() == format!("{}\n80000 100000", 96 << 20), "{after}");
    ensure!(read(&neighbour)? == other, "the neighbour has changed: {}", read(&neighbour)?);
    let status =
        container.status()?.resources.and_then(|resources| resources.linux).context("no resources")?;
    ensure!(status.memory_limit_in_bytes == 96 << 20 && status.cpu_quota == 80_000, "{status:?}");
    pod.remove()
}
