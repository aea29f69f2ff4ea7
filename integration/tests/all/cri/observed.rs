//! What the command line shows of a pod of Kubernetes to a person at the node, by the ids that `crictl` prints.

use anyhow::{Context, Result, ensure};
use machinen_integration::cri::{Node, api};
use serde_json::Value;

use super::pod_tests;

pod_tests! {
    machinen_2_1(V2_1, Machinen): [a_pod_is_seen];
    sandbox_2_1(V2_1, MachinenSandbox): [a_pod_is_seen];
}

fn a_pod_is_seen(node: &mut Node) -> Result<()> {
    let machinen =
        |args: &[&str]| -> Result<String> { Ok(node.containerd().machinen(args)?.run()?.ok()?.text()) };
    let pod = node.pod(|_| ())?;
    let main = pod.start("main", &["sh", "-c", "sleep 4321 & wait"], |_| ())?;
    // Its process is killed for lack of memory, and the container continues.
    let limited = |config: &mut api::ContainerConfig| {
        config.linux.get_or_insert_default().resources =
            Some(api::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() });
    };
    let script = "tail -n 1 /dev/zero; echo killed; sleep 100000";
    let eater = pod.start("eater", &["sh", "-c", script], limited)?;
    eater.wait_for_log("killed")?;

    let listed: Value = serde_json::from_str(&machinen(&["ls", "--format", "json"])?)?;
    let ids: Vec<_> = listed.as_array().context("no list")?.iter().map(|row| row["id"].clone()).collect();
    ensure!(
        [pod.id(), main.id(), eater.id()].iter().all(|id| ids.iter().any(|found| found == id)),
        "{listed}"
    );
    let processes = machinen(&["top", main.id()])?;
    ensure!(processes.contains("sleep 4321"), "{processes}");
    machinen(&["console", pod.id()])?;

    let metrics = machinen(&["metrics"])?;
    let labels = |id: &str, name: &str| {
        let image = if name == "POD" { "" } else { "image=\"machinen.test/busybox:1\"," };
        let id = format!("id=\"{id}\",");
        let pod = format!("container=\"{name}\",pod=\"pod-1\",namespace=\"default\"");
        move |line: &str| line.contains(&id) && line.contains(image) && line.contains(&pod)
    };
    let value = |family: &str, labels: &dyn Fn(&str) -> bool| -> Result<f64> {
        let line = metrics.lines().find(|line| line.starts_with(&format!("{family}{{")) && labels(line));
        let line = line.with_context(|| format!("no {family} in {metrics}"))?;
        Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
    };
    let (of_main, of_eater) = (labels(main.id(), "main"), labels(eater.id(), "eater"));
    ensure!(value("container_cpu_usage_seconds_total", &of_main)? > 0.0, "{metrics}");
    ensure!(value("container_oom_events_total", &of_eater)? >= 1.0, "{metrics}");
    ensure!(value("container_oom_events_total", &of_main)? == 0.0, "{metrics}");
    ensure!(value("container_spec_memory_limit_bytes", &of_eater)? == f64::from(32 << 20), "{metrics}");
    let received = |line: &str| line.contains(main.id()) && line.contains("interface=\"eth0\"");
    value("container_network_receive_bytes_total", &received)?;

    let all = machinen(&["debug", pod.id()])?;
    for wanted in ["VM: pid ", main.id(), eater.id(), "sleep 4321", "eth0: ", "console of the guest:"] {
        ensure!(all.contains(wanted), "no {wanted:?} in {all}");
    }
    pod.remove()
}
