//! Packets that the host's kernel moves between the tap and the guest (vhost-net), where it can; with the same traffic
//! where it cannot.

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use machinen::accel::{self, AccelMode, Accelerator};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    served::Served,
    setup::{Setup, Value},
    templates::Templates,
};

use super::{
    lab::{Lab, OWN, PEER},
    moved::{Connection, ECHO, checkpoint, config, listening},
    until,
};
use crate::harness::on_newest_containerd;

on_newest_containerd!(the_hosts_kernel_moves_packets, workers_are_those_of_the_devices);

const DEVICE: &str = "/dev/vhost-net";
const MIB: usize = 4;
/// A worker that has nothing to do is woken less often than this, and by the transfers many times more often.
const BUSY: u64 = 20;

/// Of a clone, and of a restored container.
fn the_hosts_kernel_moves_packets(containerd: &mut Containerd) -> Result<()> {
    let expected = u64::from(can_move(containerd)?);
    let templates = Templates::new(containerd)?;
    let setup = Setup::new().templates(&templates.dir, "use");
    containerd.configure(&setup.set("vm", "vhost_net_devices", Value::number(1)))?;
    templates.build()?;
    let lab = Lab::wired()?;
    let bundle = Bundle::busybox(containerd)?;
    let config = config(&bundle, &lab.path(), ECHO, &[])?;
    let source = listening(containerd, &config)?;
    let mut connection = Connection::open(&lab, OWN)?;
    connection.exchange("before")?;
    transfer(&lab, &source)?;
    of_a_clone(qemu(containerd, &source)?, expected)?;
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir, true)?;
    source.wait("")?;
    source.end_stopped()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    connection.exchange("after")?;
    transfer(&lab, &restored)?;
    of_a_clone(qemu(containerd, &restored)?, expected)?;
    restored.end()?;
    templates.remove_all()?;
    fs::remove_dir_all(&dir)?;
    lab.nothing_is_left()
}

/// Only without the kernel's vsock are all workers of a VM those of its network.
fn workers_are_those_of_the_devices(containerd: &mut Containerd) -> Result<()> {
    let usable = can_move(containerd)?;
    for devices in [1, 0] {
        let serial = Setup::new().set("vm", "channel", Value::text("serial"));
        containerd.configure(&serial.set("vm", "vhost_net_devices", Value::number(devices)))?;
        let lab = Lab::wired()?;
        let bundle = Bundle::busybox(containerd)?;
        let served = Served::run(containerd, &config(&bundle, &lab.path(), "exec sleep 1000", &[])?)?;
        transfer(&lab, &served)?;
        let expected = if usable { devices } else { 0 };
        let qemu = qemu(containerd, &served)?;
        handed_over(qemu, expected)?;
        let wakeups = wakeups(qemu)?;
        let busy = wakeups.iter().filter(|count| **count >= BUSY).count() as u64;
        ensure!(busy == expected, "{busy} workers have moved packets in place of {expected}: {wakeups:?}");
        served.end()?;
        lab.nothing_is_left()?;
    }
    Ok(())
}

/// Whether the kernel of this host can move packets for guests that KVM runs.
fn can_move(containerd: &Containerd) -> Result<bool> {
    let kvm = accel::verdict(containerd.root())?.choose(AccelMode::Auto)? == Accelerator::Kvm;
    Ok(kvm && File::options().read(true).write(true).open(DEVICE).is_ok())
}

/// Sends data to the neighbour, and receives some.
fn transfer(lab: &Lab, served: &Served<'_>) -> Result<()> {
    let sink = lab.start_in_peer(&["busybox", "nc", "-ll", "-p", "7002", "-e", "wc", "-c"])?;
    let count = format!("count={MIB}");
    let give = ["busybox", "nc", "-ll", "-p", "7003", "-e", "dd", "if=/dev/zero", "bs=1M", &count];
    let source = lab.start_in_peer(&give)?;
    let (status, output) = served.shell(&format!(
        "{}; dd if=/dev/zero bs=1M {count} 2> /dev/null | nc {PEER} 7002; nc {PEER} 7003 < /dev/null | wc -c",
        until(&format!("nc {PEER} 7002 < /dev/null > /dev/null"))
    ))?;
    let bytes = MIB << 20;
    ensure!(status == 0 && output == format!("{bytes}\n{bytes}\n"), "{status}: {output}");
    drop((sink, source));
    Ok(())
}

fn qemu(containerd: &Containerd, served: &Served<'_>) -> Result<u32> {
    let inventory = containerd.inventory()?;
    let is_qemu = |command: &str| command.contains("qemu-system") && command.contains(&served.shim.id);
    let qemu = inventory.processes.iter().find(|process| is_qemu(&process.command));
    Ok(qemu.with_context(|| format!("no QEMU in\n{inventory}"))?.pid)
}

fn of_a_clone(qemu: u32, expected: u64) -> Result<()> {
    let command = fs::read_to_string(format!("/proc/{qemu}/cmdline"))?;
    // The memory of a VM that boots is no file.
    ensure!(command.contains("memory-backend-file"), "the VM has booted: {command}");
    handed_over(qemu, expected)
}

/// QEMU has handed that many network devices over.
fn handed_over(qemu: u32, expected: u64) -> Result<()> {
    let mut found = 0;
    for entry in fs::read_dir(format!("/proc/{qemu}/fd"))? {
        found += u64::from(fs::read_link(entry?.path())? == Path::new(DEVICE));
    }
    ensure!(found == expected, "{found} descriptors of {DEVICE} in place of {expected}");
    Ok(())
}

/// How often each of the kernel's workers for this QEMU has been woken. They are threads of QEMU, before Linux 6.4 of the
/// kernel.
fn wakeups(qemu: u32) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let Ok(tasks) = fs::read_dir(process.path().join("task")) else { continue };
        for task in tasks.filter_map(Result::ok) {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            if read("comm").trim_end() == format!("vhost-{qemu}") {
                let status = read("status");
                let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
                found.push(count.context("no count")?.trim().parse()?);
            }
        }
    }
    Ok(found)
}
