//! What containers use, and what they may use.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Container, Handler, Node, Pod, Refusal, api, eventually},
    paths::Version,
    process::Invocation,
};

use super::{both_runtimes, pod_tests};

both_runtimes! {
    every: [],
    oldest_and_newest: [statistics],
    newest: [limits_and_their_change, limits_that_cannot_be, statistics_while_containers_are_made],
}

pod_tests! {
    room_machinen(V2_1, Machinen): [room_to_grow, a_limit_beyond_the_vm];
    room_sandbox(V2_1, MachinenSandbox): [room_to_grow, a_limit_beyond_the_vm];
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
    if node.containerd().version() == Version::V2_1 {
        pod_statistics(node, &pod)?;
    }
    pod.remove()
}

/// kubelet asks for the statistics of all containers every few seconds. One that is being created has none, which is no
/// error, and those of its neighbours are there.
fn statistics_while_containers_are_made(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let neighbour = pod.idle("neighbour")?;
    let done = AtomicBool::new(false);
    let from = node.containerd().log().position();
    thread::scope(|scope| -> Result<()> {
        let asked = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let found =
                    pod.client().list_container_stats(api::ListContainerStatsRequest::default())?.stats;
                let ids: Vec<_> =
                    found.iter().filter_map(|stats| Some(&*stats.attributes.as_ref()?.id)).collect();
                ensure!(ids.contains(&neighbour.id()), "{ids:?}");
            }
            Ok(())
        });
        let made = (0..3).try_for_each(|number| pod.idle(&format!("main-{number}")).map(drop));
        done.store(true, Ordering::Relaxed);
        asked.join().expect("asking does not panic").and(made)
    })?;
    let log = node.containerd().log().since(from);
    let complaint = log.iter().find(|line| line.contains("collecting metrics for"));
    ensure!(complaint.is_none(), "{complaint:?}");
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
        resources.memory_limit_in_bytes = 40 << 20;
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
    ensure!(before.trim() == format!("{}\n50000 100000", 40 << 20), "{before}");
    resize(&container, 96, 80_000)?;
    let after = read(&container)?;
    ensure!(after.trim() == format!("{}\n80000 100000", 96 << 20), "{after}");
    ensure!(read(&neighbour)? == other, "the neighbour has changed: {}", read(&neighbour)?);
    let status =
        container.status()?.resources.and_then(|resources| resources.linux).context("no resources")?;
    ensure!(status.memory_limit_in_bytes == 96 << 20 && status.cpu_quota == 80_000, "{status:?}");
    // The larger limit holds: this was impossible before.
    container.shell("dd if=/dev/zero of=/dev/more bs=1M count=60 2> /dev/null")?;
    pod.remove()
}

/// What kubelet sends for a resize: MiB, and microseconds in each 100 ms.
fn resize(container: &Container<'_>, mib: i64, quota: i64) -> Result<(), Refusal> {
    let request = api::UpdateContainerResourcesRequest {
        container_id: container.id().to_owned(),
        linux: Some(resources(mib, quota)),
        ..Default::default()
    };
    container.client().update_container_resources(request).map(drop)
}

fn resources(mib: i64, quota: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        cpu_period: 100_000,
        cpu_quota: quota,
        ..Default::default()
    }
}

fn limited<'a>(pod: &'a Pod, name: &str, mib: i64, quota: i64) -> Result<Container<'a>> {
    pod.start(name, &["sleep", "100000"], |config| {
        config.linux.get_or_insert_default().resources = Some(resources(mib, quota));
    })
}

/// MiB of the container's status.
fn limit_in_status(container: &Container<'_>) -> Result<i64> {
    let resources = container.status()?.resources.and_then(|resources| resources.linux);
    Ok(resources.context("no resources")?.memory_limit_in_bytes >> 20)
}

/// A limit below what is in use, and limits that the VM has no room for: the container continues with its old limits, and
/// another change works.
fn limits_that_cannot_be(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = limited(&pod, "main", 128, 50_000)?;
    // The container's own tmpfs; /dev/shm is the pod's.
    container.shell("dd if=/dev/zero of=/dev/used bs=1M count=60 2> /dev/null")?;
    let is_machinen = node.handler() != Handler::Runc;
    // With runc the kernel decides: cgroup v1 refuses, and v2 ends the container's processes.
    if is_machinen {
        let Err(refusal) = resize(&container, 32, 50_000) else { anyhow::bail!("32 MiB are not enough") };
        ensure!(refusal.message.contains("that cannot be reclaimed"), "{refusal}");
    }
    if is_machinen {
        for (mib, quota, words) in
            [(1 << 20, 50_000, "io.machinen.memory-ceiling"), (128, 6_400_000, "io.machinen.vcpus")]
        {
            let Err(refusal) = resize(&container, mib, quota) else { anyhow::bail!("{mib} MiB, {quota} us") };
            ensure!(refusal.message.contains(words), "{refusal}");
        }
    }
    ensure!(container.runs()? && limit_in_status(&container)? == 128, "{:?}", container.status());
    container.shell("rm /dev/used")?;
    resize(&container, 48, 20_000)?;
    ensure!(limit_in_status(&container)? == 48, "{:?}", container.status());
    pod.remove()
}

/// The VM of a pod that says its limits is larger than they are: all containers together can grow, up to what it has.
fn room_to_grow(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| {
        config.linux.get_or_insert_default().resources = Some(resources(1900, 0));
    })?;
    let (first, second) = (limited(&pod, "first", 1800, 50_000)?, limited(&pod, "second", 100, 50_000)?);
    let vm = first.shell("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?;
    let vm: i64 = vm.trim().parse()?;
    ensure!((3800..=4096).contains(&vm), "the VM has {vm} MiB");
    resize(&first, 3000, 50_000)?;
    ensure!(limit_in_status(&first)? == 3000, "{:?}", first.status());
    // The other container's limit counts, too.
    let Err(refusal) = resize(&second, 1200, 50_000) else { anyhow::bail!("4200 MiB in a VM of 4096") };
    ensure!(refusal.message.contains("3000 MiB of the pod's other containers"), "{refusal}");
    ensure!(limit_in_status(&second)? == 100, "{:?}", second.status());
    resize(&first, 1800, 50_000)?;
    resize(&second, 1200, 50_000)?;
    pod.remove()
}

/// A pod in which one container has no limit has none itself, so its VM has the usual size, whatever the others' limits are.
fn a_limit_beyond_the_vm(node: &mut Node) -> Result<()> {
    for (ceiling, expected) in [(None, 1700..=2048), (Some("1000"), 800..=1000)] {
        let from = node.containerd().log().position();
        let pod = node.pod(|config| {
            let name = "io.machinen.memory-ceiling".to_owned();
            config.annotations.extend(ceiling.map(|mib| (name, mib.to_owned())));
        })?;
        let limited = limited(&pod, "limited", 16 << 10, 50_000)?;
        let vm = limited.shell("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?;
        let vm: i64 = vm.trim().parse()?;
        ensure!(expected.contains(&vm), "the VM has {vm} MiB");
        let log = node.containerd().log().since(from);
        ensure!(log.iter().any(|line| line.contains("io.machinen.memory-ceiling gives it more")), "{log:?}");
        pod.remove()?;
    }
    Ok(())
}

/// What kubelet asks for if its `cgroupDriver` is systemd, its default.
#[test]
#[ignore = "needs a host with systemd and cgroups of version 2 (make test-kvm)"]
fn a_scope_in_a_slice_of_systemd() {
    super::run(Version::V2_1, Handler::Machinen, a_scope_in_a_slice);
}

/// The same for a pod without a pause container.
#[test]
#[ignore = "needs a host with systemd and cgroups of version 2 (make test-kvm)"]
fn a_scope_in_a_slice_of_systemd_without_pause() {
    super::run(Version::V2_1, Handler::MachinenSandbox, a_scope_in_a_slice);
}

fn a_scope_in_a_slice(node: &mut Node) -> Result<()> {
    let slices = format!("machinentest{}", std::process::id());
    let parent = format!("/{slices}.slice/{slices}-pod.slice");
    let systemctl = |args: &[&str]| -> Result<String> {
        Ok(Invocation::new("systemctl").args(args).run()?.text().trim().to_owned())
    };
    let pod = node.pod(|config| config.linux.get_or_insert_default().cgroup_parent.clone_from(&parent))?;
    let container = limited(&pod, "main", 96, 50_000)?;
    let unit = format!("cri-containerd-{}.scope", pod.id());
    let active = systemctl(&["is-active", &unit])?;
    ensure!(active == "active", "{unit} is {active}");
    let group = Path::new("/sys/fs/cgroup").join(&parent[1..]).join(&unit);
    let members = || fs::read_to_string(group.join("cgroup.procs"));
    // The pause container has no limit of memory, and so the pod's processes have none; those of the guest hold.
    resize(&container, 128, 50_000)?;
    systemctl(&["daemon-reload"])?;
    ensure!(!members()?.is_empty(), "no process is in {}", group.display());
    pod.remove()?;
    let after = systemctl(&["show", "--value", "--property", "LoadState", &unit])?;
    ensure!(after == "not-found", "{unit} is {after}");
    // As kubelet does, which has made the slices.
    systemctl(&["stop", &format!("{slices}.slice")]).map(drop)
}
