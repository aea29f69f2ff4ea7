//! Pods: an infra container and others that share its namespaces.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::podman::{Podman, PodmanCommands as _};

use super::{
    network::{from_port, until},
    with_podman,
};
use crate::harness::IMAGE;

with_podman!(two_containers, a_life, played);

const SERVER: [&str; 7] = ["nc", "-ll", "-p", "80", "-e", "echo", "served"];

/// Containers of a pod reach each other at 127.0.0.1, and share memory and the host's name.
fn two_containers(podman: &Podman) -> Result<()> {
    podman.ok(&["pod", "create", "--name", "pod", "--hostname", "shared", "-p", "8080:80"])?;
    let run = ["run", "-d", "--pod", "pod", "--name", "server", IMAGE];
    podman.ok(&[&run[..], &SERVER].concat())?;
    let script = format!(
        "hostname; {}; echo x > /dev/shm/file; ps | grep -c '[n]c -ll'; true",
        until("nc 127.0.0.1 80 < /dev/null | grep served")
    );
    let output = podman.ok(&["run", "--rm", "--pod", "pod", IMAGE, "sh", "-c", &script])?;
    ensure!(output == "shared\nserved\n0", "{output}");
    ensure!(from_port(podman, "127.0.0.1", 8080)? == "served");
    let seen = podman.ok(&["exec", "server", "cat", "/dev/shm/file"])?;
    ensure!(seen == "x", "{seen}");
    let state = podman.ok(&["pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "pod"])?;
    ensure!(state == "Running 2", "{state}");
    podman.ok(&["pod", "rm", "--force", "--time", "0", "pod"]).map(drop)
}

fn a_life(podman: &Podman) -> Result<()> {
    podman.ok(&["pod", "create", "--name", "pod", "--share", "net,ipc,uts,pid"])?;
    for name in ["one", "two"] {
        let script = "trap 'exit 5' TERM; while :; do sleep 0.1; done";
        podman.ok(&["run", "-d", "--pod", "pod", "--name", name, IMAGE, "sh", "-c", script])?;
    }
    // The processes of all are in one namespace.
    let seen = podman.ok(&["exec", "one", "sh", "-c", "ps | grep -c '[t]rap .exit 5'"])?;
    ensure!(seen == "2", "{seen}");
    podman.ok(&["pod", "pause", "pod"])?;
    let states = podman.ok(&["ps", "--filter", "pod=pod", "--format", "{{.State}}"])?;
    ensure!(states.lines().all(|state| state == "paused"), "{states}");
    podman.ok(&["pod", "unpause", "pod"])?;
    podman.ok(&["pod", "stop", "--time", "60", "pod"])?;
    let states = podman.ok(&["inspect", "--format", "{{.State.Status}}", "one", "two"])?;
    ensure!(states == "exited\nexited", "{states}");
    podman.ok(&["pod", "start", "pod"])?;
    podman.ok(&["pod", "kill", "pod"])?;
    podman.ok(&["wait", "one", "two"])?;
    podman.ok(&["pod", "rm", "--force", "--time", "0", "pod"]).map(drop)
}

/// Kubernetes' description of a pod, made by Podman and played again.
fn played(podman: &Podman) -> Result<()> {
    let data = podman.dir().join("data");
    fs::create_dir(&data)?;
    podman.ok(&["pod", "create", "--name", "pod", "-p", "8080:80"])?;
    let volume = format!("{}:/data", data.display());
    let create = ["create", "--pod", "pod", "--name", "server", "--env", "NAME=x", "-v", &volume, IMAGE];
    let script = "echo $NAME > /data/file; exec nc -ll -p 80 -e echo served";
    podman.ok(&[&create[..], &["sh", "-c", script]].concat())?;
    let file = podman.dir().join("pod.yaml").display().to_string();
    podman.ok(&["generate", "kube", "--filename", &file, "pod"])?;
    podman.ok(&["pod", "rm", "--force", "pod"])?;
    podman.ok(&["kube", "play", &file])?;
    ensure!(from_port(podman, "127.0.0.1", 8080)? == "served");
    ensure!(fs::read_to_string(data.join("file"))? == "x\n");
    let state = podman.ok(&["pod", "inspect", "--format", "{{.State}} {{.NumContainers}}", "pod"])?;
    ensure!(state == "Running 2", "{state}");
    podman.ok(&["pod", "kill", "pod"])?;
    podman.ok(&["kube", "down", &file])?;
    Ok(fs::remove_dir_all(data)?)
}
