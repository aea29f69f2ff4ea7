//! Pods whose sandbox is the shim's own (containerd's Sandbox API), where they differ from pods with a pause container.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    cri::{Node, Pod, api, eventually},
    inventory,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::pod_tests;

pod_tests! {
    machinen_2_1(V2_1, MachinenSandbox): [
        files_of_the_pod, the_end_of_the_vm, the_end_of_the_shim, described, a_failed_start,
    ];
}

/// The pids of the node's processes whose program has this name.
fn pids(node: &Node, program: &str) -> Result<Vec<u32>> {
    let all = inventory::descendants(node.containerd().keeper_pid())?;
    let named = |command: &str| {
        command.split(' ').next().is_some_and(|path| path.rsplit('/').next() == Some(program))
    };
    Ok(all.iter().filter(|process| named(&process.command)).map(|process| process.pid).collect())
}

fn killed(node: &Node, program: &str) -> Result<()> {
    let pids = pids(node, program)?;
    let [pid] = pids[..] else { anyhow::bail!("not one {program}: {pids:?}") };
    Ok(kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)?)
}

fn not_ready(pod: &Pod) -> Result<()> {
    eventually("the pod is not ready any more", || {
        Ok((pod.status()?.state() == api::PodSandboxState::SandboxNotready).then_some(()))
    })
}

/// containerd makes none of them. What a container's own configuration mounts there is not replaced.
fn files_of_the_pod(node: &mut Node) -> Result<()> {
    let pod = node.pod(|config| config.hostname = "web-0".to_owned())?;
    let hosts = pod.dir()?.join("hosts");
    fs::write(&hosts, "10.1.2.3 given\n")?;
    let first = pod.idle("first")?;
    let second = pod.start("second", &["sleep", "100000"], |config| {
        config.mounts.push(api::Mount {
            container_path: "/etc/hosts".to_owned(),
            host_path: hosts.display().to_string(),
            ..Default::default()
        });
    })?;
    let node_hosts = fs::read_to_string("/etc/hosts")?;
    ensure!(first.shell("cat /etc/hosts")? == node_hosts, "{}", first.shell("cat /etc/hosts")?);
    ensure!(first.shell("cat /etc/hostname")? == "web-0\n", "{}", first.shell("cat /etc/hostname")?);
    ensure!(second.shell("cat /etc/hosts")? == "10.1.2.3 given\n", "the container's own file was replaced");
    // The pod's memory is bounded, as with a pause container.
    let size = first.shell("df -k /dev/shm | awk 'END { print $2 }'")?;
    ensure!(size == "65536\n", "{size}");
    first.shell("echo 10.9.9.9 written >> /etc/hosts")?;
    ensure!(fs::read_to_string("/etc/hosts")? == node_hosts, "the node's own file was written");
    pod.remove()
}

fn the_end_of_the_vm(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    killed(node, "qemu-system-x86_64")?;
    ensure!(container.wait()?.exit_code != 0, "{:?}", container.status());
    not_ready(&pod)?;
    let late = pod.idle("late");
    ensure!(late.is_err(), "a container has started in a pod without a VM");
    pod.remove()
}

/// The shim is killed: nothing of the pod stays, not even its mount.
fn the_end_of_the_shim(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let container = pod.idle("main")?;
    let shim = pids(node, "containerd-shim-machinen-v1")?;
    // Its other processes have the same name, and end with it.
    let shim = shim.first().context("no shim")?;
    kill(Pid::from_raw(shim.cast_signed()), Signal::SIGKILL)?;
    ensure!(container.wait()?.exit_code != 0, "{:?}", container.status());
    not_ready(&pod)?;
    pod.remove()
}

/// The reason of a failed start reaches the client, nothing stays, and the next pod works.
fn a_failed_start(node: &mut Node) -> Result<()> {
    let refused = node.pod(|config| {
        config.annotations.insert("io.machinen.no-such-option".to_owned(), "1".to_owned());
    });
    let Err(error) = refused else { anyhow::bail!("an unknown annotation was accepted") };
    ensure!(format!("{error:#}").contains("io.machinen.no-such-option"), "{error:#}");
    node.pod(|_| ())?.remove()
}

/// `crictl inspectp` asks for details.
fn described(node: &mut Node) -> Result<()> {
    let pod = node.pod(|_| ())?;
    let request = api::PodSandboxStatusRequest { pod_sandbox_id: pod.id().to_owned(), verbose: true };
    let info = node.client().pod_sandbox_status(request)?.info;
    ensure!(info.contains_key("vmMemoryMiB") && info.contains_key("vmPid"), "{info:?}");
    pod.remove()
}
