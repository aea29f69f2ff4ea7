//! The life of pods and containers, each verb for itself.

use anyhow::{Context, Result, ensure};
use machinen_integration::cri::{Node, Refusal, api};

use super::both_runtimes;

both_runtimes! {
    every: [a_pod_of_two_containers],
    oldest_and_newest: [],
    newest: [exec_with_codes_output_and_time, logs_of_both_streams, stopped_with_grace, verbs_may_be_repeated, listed],
}

/// The shortest story: all verbs once.
fn a_pod_of_two_containers(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxReady, "the pod is not ready");
    let first = pod.start("first", &["sh", "-c", "echo hello; sleep 1000000"], |_| ())?;
    let second = pod.idle("second")?;
    first.wait_for_log("hello")?;
    for container in [&first, &second] {
        let name = container.shell("hostname")?;
        ensure!(name == "pod-1\n", "{name}");
    }
    second.stop(0)?;
    let status = second.wait()?;
    ensure!(status.exit_code == 137, "{status:?}");
    ensure!(first.runs()?, "the first container ended with the second");
    second.remove()?;
    pod.remove()
}

fn exec_with_codes_output_and_time(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    let both = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"], 60)?;
    ensure!(both.exit_code == 3 && both.stdout == b"out\n" && both.stderr == b"err\n", "{both:?}");
    let killed = container.exec(&["sh", "-c", "kill -9 $$"], 60)?;
    ensure!(killed.exit_code == 137, "{killed:?}");
    let large = container.exec(&["sh", "-c", "dd if=/dev/zero bs=1000 count=3000 2> /dev/null"], 60)?;
    ensure!(large.stdout.len() == 3_000_000, "{} bytes", large.stdout.len());
    let missing = container.exec(&["no-such-program"], 60);
    ensure!(missing.is_err(), "{missing:?}");
    let late = container.exec(&["sleep", "1000"], 1);
    ensure!(matches!(&late, Err(refusal) if refusal.message.contains("timeout")), "{late:?}");
    let left = container.shell("ps | grep -c '[s]leep 1000$' || true")?;
    ensure!(left == "0\n", "the overdue process is left: {left}");
    pod.remove()
}

fn logs_of_both_streams(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let script =
        "echo one; echo two >&2; printf three; dd if=/dev/zero bs=20000 count=1 2> /dev/null | tr '\\0' x";
    let container = pod.start("main", &["sh", "-c", script], |_| ())?;
    container.wait()?;
    let log = container.log()?;
    let of = |stream: &str| -> String {
        log.iter()
            .filter(|line| line.stream == stream)
            .map(|line| line.text.clone())
            .collect::<Vec<_>>()
            .join("|")
    };
    ensure!(of("stderr") == "two", "{}", of("stderr"));
    let out = of("stdout");
    ensure!(out.starts_with("one|threexxx"), "{}", &out[..20.min(out.len())]);
    ensure!(out.matches('x').count() == 20_000, "{} bytes", out.len());
    ensure!(log.iter().any(|line| !line.full), "a line of 20 000 bytes is not in parts");

    // kubelet renames the file of a running container, and asks for a new one.
    let running = pod.start("rotated", &["sh", "-c", "echo before; exec sleep 1000000"], |_| ())?;
    running.wait_for_log("before")?;
    std::fs::rename(running.log_file(), running.log_file().with_extension("1"))?;
    pod.client()
        .reopen_container_log(api::ReopenContainerLogRequest { container_id: running.id().to_owned() })?;
    running.stop(0)?;
    ensure!(running.log()?.is_empty(), "{:?}", running.log());
    pod.remove()
}

fn stopped_with_grace(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    // The shell runs its trap when sleep has ended.
    let polite = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = pod.start("polite", &["sh", "-c", polite], |_| ())?;
    let deaf = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let deaf = pod.start("deaf", &["sh", "-c", deaf], |_| ())?;
    polite.wait_for_log("ready")?;
    deaf.wait_for_log("ready")?;
    polite.stop(60)?;
    let status = polite.wait()?;
    ensure!(status.exit_code == 5 && status.reason == "Error", "{status:?}");
    polite.wait_for_log("bye")?;
    deaf.stop(1)?;
    let status = deaf.wait()?;
    ensure!(status.exit_code == 137, "{status:?}");
    pod.remove()
}

fn verbs_may_be_repeated(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    container.stop(0)?;
    container.stop(0)?;
    container.remove()?;
    container.remove()?;
    let second = pod.idle("second")?;
    pod.stop()?;
    pod.stop()?;
    ensure!(second.wait()?.exit_code == 137, "{:?}", second.status());
    ensure!(pod.status()?.state() == api::PodSandboxState::SandboxNotready, "a stopped pod is ready");
    let late = pod.create("late", &["true"], |_| ()).and_then(|container| Ok(container.start()?));
    ensure!(late.is_err(), "a container has started in a stopped pod");
    pod.remove()?;
    pod.remove()?;
    let gone = pod.status();
    let not_found = |error: &anyhow::Error| error.downcast_ref::<Refusal>().is_some_and(is_not_found);
    ensure!(gone.as_ref().is_err_and(not_found), "{gone:?}");
    Ok(())
}

fn is_not_found(refusal: &Refusal) -> bool {
    format!("{:?}", refusal.code) == "NotFound"
}

fn listed(node: &mut Node) -> Result<()> {
    let pods = [node.pod(|_| ())?, node.pod(|_| ())?];
    let containers = [pods[0].idle("a")?, pods[0].create("b", &["true"], |_| ())?, pods[1].idle("c")?];
    let all = node.client().list_pod_sandbox(api::ListPodSandboxRequest::default())?.items;
    ensure!(all.len() == 2 && all.iter().all(|pod| pod.runtime_handler == node.handler().name()), "{all:?}");
    let filter = api::ContainerFilter { pod_sandbox_id: pods[0].id().to_owned(), ..Default::default() };
    let request = api::ListContainersRequest { filter: Some(filter) };
    let mut found = node.client().list_containers(request)?.containers;
    found.sort_by_key(|container| container.metadata.clone().unwrap_or_default().name);
    let states: Vec<_> = found.iter().map(|container| (container.id.as_str(), container.state())).collect();
    let wanted = [
        (containers[0].id(), api::ContainerState::ContainerRunning),
        (containers[1].id(), api::ContainerState::ContainerCreated),
    ];
    ensure!(states == wanted, "{states:?}");
    let status = containers[1].status()?;
    ensure!(status.started_at == 0 && status.created_at > 0, "{status:?}");
    let log = std::path::Path::new(&status.log_path).parent().context("no directory")?;
    ensure!(log.is_dir(), "{}", log.display());
    pods[0].remove()?;
    pods[1].remove()
}
