//! What a VM has in the namespace of its container disappears with the VM, whatever ends it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, process::Running};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    end,
    lab::{Lab, OWN, PEER},
    run, until,
};
use crate::harness::{fails_saying, on_newest_containerd, works};

on_newest_containerd!(
    killed,
    a_failed_create_leaves_nothing,
    a_guest_that_resets_its_devices,
    many_have_the_addresses_of_their_own_namespaces
);

pub(super) fn process(containerd: &Containerd, id: &str, words: [&str; 2]) -> Result<Pid> {
    let inventory = containerd.inventory()?;
    let mut processes = inventory.processes.iter();
    let found =
        processes.find(|process| words.iter().chain([&id]).all(|word| process.command.contains(word)));
    let found = found.with_context(|| format!("no process of {id} with {words:?} in\n{inventory}"))?;
    Ok(Pid::from_raw(found.pid.cast_signed()))
}

/// Removes a container whose task has ended or is being removed.
pub(super) fn remove(containerd: &Containerd, id: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        containerd.ctr_output(&["tasks", "delete", id])?;
        let removed = containerd.ctr_output(&["containers", "delete", id])?;
        if removed.status == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the container cannot be removed: {removed}");
    }
}

fn killed(containerd: &mut Containerd) -> Result<()> {
    for words in [["containerd-shim-machinen-v1", "-id"], ["qemu-system", "microvm"]] {
        let lab = Lab::wired()?;
        let before = containerd.inventory()?;
        let container = run(containerd, &lab, "sleep 1000").detached().flag("--null-io");
        container.ok()?;
        let connected = lab.left()?;
        ensure!(connected.contains("machinen0") && connected.contains("clsact"), "{connected}");
        let from = containerd.log().position();
        kill(process(containerd, container.container(), words)?, Signal::SIGKILL)?;
        // containerd reports no exit of a container whose shim is gone, and removes the task by itself.
        let ended = |line: &str| line.contains("/tasks/exit") || line.contains("cleaning up dead shim");
        containerd.log().wait_for(from, ended)?;
        remove(containerd, container.container())?;
        containerd.settle(&before)?;
        lab.nothing_is_left().with_context(|| format!("after the kill of {words:?}"))?;
    }
    works(containerd)
}

fn a_failed_create_leaves_nothing(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let run = containerd.run(crate::harness::IMAGE, &["/no/such/program"]).flag(lab.flag());
    fails_saying(containerd, &run, &["/no/such/program"])?;
    lab.nothing_is_left()?;
    // A VM that boots, and a name that the namespace has already.
    lab.change(&["link", "add", "machinen0", "type", "veth", "peer", "name", "other"])?;
    let run = super::run(containerd, &lab, "true");
    fails_saying(containerd, &run, &["connected with another VM"])?;
    lab.change(&["link", "delete", "machinen0"])?;
    lab.nothing_is_left()
}

/// As a guest does that powers off, or one that is not to be trusted.
fn a_guest_that_resets_its_devices(containerd: &mut Containerd) -> Result<()> {
    let lab = Lab::wired()?;
    let script = "cd /sys/bus/virtio/drivers/virtio_net && for device in virtio*; do echo $device >unbind; done; \
                  ls -d virtio* 2>/dev/null; echo well";
    let output = run(containerd, &lab, script).flag("--privileged").ok()?;
    ensure!(output == "well\n", "{output:?}");
    lab.nothing_is_left()
}

fn many_have_the_addresses_of_their_own_namespaces(containerd: &mut Containerd) -> Result<()> {
    const COUNT: usize = 10;
    let labs = (0..COUNT).map(|_| Lab::wired()).collect::<Result<Vec<_>>>()?;
    let script = format!(
        "cat /sys/class/net/eth0/address; {}; echo ready; sleep 1000",
        until(&format!("ping -c 1 -W 5 {PEER} > /dev/null"))
    );
    let containers: Vec<_> = labs.iter().map(|lab| run(containerd, lab, &script)).collect();
    let running = containers.iter().map(|container| container.spawn(Duration::from_secs(300)));
    let running = running.collect::<Result<Vec<Running>>>()?;
    running.iter().try_for_each(|running| running.wait_for_stdout("ready"))?;
    for lab in &labs {
        let output = lab.in_peer(&["busybox", "ping", "-c", "1", "-W", "10", OWN])?;
        ensure!(output.status == 0, "{output}");
        let outside = lab.change(&["-o", "link", "show", "dev", "eth0"])?;
        let neighbour = lab.in_peer(&["ip", "neighbour", "show", OWN])?.text();
        let mac = neighbour.split_whitespace().skip_while(|word| *word != "lladdr").nth(1);
        let mac = mac.with_context(|| format!("no address in {neighbour}"))?;
        ensure!(outside.contains(mac), "{mac} is not the address of {outside}");
    }
    containers.iter().zip(running).try_for_each(|(run, running)| end(containerd, run, running))
}
