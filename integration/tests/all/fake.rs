//! Shim and runtime against a VMM that misbehaves: every step of a start can fail, in milliseconds.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    ctr::Run,
    fake::{Behaviour, FakeVmm},
    served::Served,
    setup::Value,
    shim::{Client, Shim},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use ttrpc::Code;

use crate::{
    fork::eventually,
    harness::{fails_saying, on_every_containerd, on_newest_containerd},
};

on_every_containerd!(a_container_without_a_machine);
on_newest_containerd!(
    monitors_that_misbehave,
    guests_that_misbehave,
    killed_while_running,
    failures_leave_no_descriptors,
    many_lives,
    annotations_of_later_containers,
);

/// Makes shims use a fake VMM, and makes a rootfs for specifications of the test's own: `ctr` asks for a CPU
/// weight, which a host that has its CPU controller in cgroup v1 cannot give to an agent that is an ordinary
/// process.
pub(crate) fn fake(containerd: &Containerd) -> Result<(FakeVmm, Bundle)> {
    let fake = FakeVmm::start(containerd)?;
    containerd.configure(&fake.setup())?;
    Ok((fake, Bundle::busybox(containerd)?))
}

fn run<'a>(containerd: &'a Containerd, rootfs: &Bundle, command: &[&str]) -> Result<Run<'a>> {
    Ok(containerd.run_spec(&rootfs.config(command, |_| ())?))
}

/// A container that shows that starts work again.
fn works(containerd: &Containerd, rootfs: &Bundle) -> Result<()> {
    let output = run(containerd, rootfs, &["echo", "well"])?.output()?;
    ensure!(output.status == 0 && output.text() == "well\n", "a container should work again, but: {output}");
    Ok(())
}

fn a_container_without_a_machine(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let script = "echo out; echo err >&2; cat; exit 7";
    let output = run(containerd, &rootfs, &["sh", "-c", script])?.output_of_stdin(b"in\n")?;
    ensure!(output.status == 7 && output.text() == "out\nin\n" && output.error_text() == "err\n", "{output}");
    fake.settle()
}

fn monitors_that_misbehave(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    works(containerd, &rootfs)?;
    for (behaviour, words) in [
        (Behaviour::Dies("qemu: could not frobnicate\n"), &["could not frobnicate"][..]),
        (Behaviour::GreetsAs(5), &["QEMU 5.2.0 is too old", "7.2"]),
        (Behaviour::Babbles(b"SSH-2.0-OpenSSH_9.2\r\n"), &["not QMP"]),
        (Behaviour::Babbles(b"{}\r\n"), &["QEMU"]),
        (Behaviour::Refuses("qmp_capabilities"), &["qmp_capabilities", "not today"]),
        (Behaviour::Refuses("add-fd"), &["attach", "add-fd", "not today"]),
        (Behaviour::Refuses("blockdev-add"), &["attach", "blockdev-add", "not today"]),
        (Behaviour::Refuses("device_add"), &["attach", "device_add", "not today"]),
        (Behaviour::DiesOn("qmp_capabilities"), &["QEMU"]),
        (Behaviour::DiesOn("add-fd"), &["attach", "QEMU"]),
        (Behaviour::DiesOn("device_add"), &["attach", "QEMU"]),
    ] {
        fake.behaviour(behaviour);
        fails_saying(containerd, &run(containerd, &rootfs, &["true"])?, words)
            .with_context(|| format!("with {behaviour:?}"))?;
        fake.settle().with_context(|| format!("with {behaviour:?}"))?;
    }
    fake.behaviour(Behaviour::Well);
    works(containerd, &rootfs)?;
    fake.settle()
}

fn guests_that_misbehave(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    containerd.configure(&fake.setup().set("vm", "boot_timeout_s", Value::number(2)))?;
    // yamux: a data frame that opens stream 2, with what follows it.
    const VERSION_99: &[u8] = b"\0\0\0\x01\0\0\0\x02\0\0\0\x18machinen\x63\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0";
    const NOISE: &[u8] = b"\0\0\0\x01\0\0\0\x02\0\0\0\x18GET / HTTP/1.1\r\n\r\n      ";
    for (behaviour, words) in [
        (Behaviour::Silent, &["did not answer within 2s"][..]),
        (Behaviour::Speaks(VERSION_99), &["version 99"]),
        (Behaviour::Speaks(NOISE), &["agent"]),
        (Behaviour::Speaks(&[0xff; 4096]), &["agent"]),
        (Behaviour::Floods(64 << 20), &["did not answer within 2s", "####"]),
    ] {
        fake.behaviour(behaviour);
        let run = run(containerd, &rootfs, &["true"])?;
        fails_saying(containerd, &run, words).with_context(|| format!("with {behaviour:?}"))?;
        fake.settle().with_context(|| format!("with {behaviour:?}"))?;
    }
    fake.behaviour(Behaviour::Well);
    works(containerd, &rootfs)?;
    fake.settle()
}

fn killed_while_running(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    for _ in 0..5 {
        let from = containerd.log().position();
        let run = run(containerd, &rootfs, &["sleep", "1000"])?;
        let running = run.spawn(Duration::from_secs(30))?;
        containerd.log().wait_for_event(from, "/tasks/start")?;
        let inventory = containerd.inventory()?;
        let qemu = inventory.processes.iter().find(|process| process.command.contains("microvm"));
        let qemu = qemu.with_context(|| format!("no QEMU in\n{inventory}"))?;
        kill(Pid::from_raw(qemu.pid.cast_signed()), Signal::SIGKILL)?;
        let output = running.wait()?;
        ensure!(output.status == 137, "{output}");
        fake.settle()?;
    }
    Ok(())
}

fn failures_leave_no_descriptors(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let shim = Shim::new(containerd)?;
    let config = rootfs.config(&["true"], |_| ())?;
    fs::copy(config, shim.bundle.join("config.json"))?;
    let printed = shim.start(0)?;
    let client = Client::connect(String::from_utf8(printed.stdout)?.trim(), "containerd.task.v3.Task")?;
    let connect = api::ConnectRequest { id: shim.id.clone(), ..Default::default() };
    let served: api::ConnectResponse = client.ok("Connect", &connect)?;
    let open = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", served.shim_pid))?.count()) };
    // The first failure may open descriptors that are kept for good reason.
    fake.behaviour(Behaviour::Refuses("device_add"));
    client.refused("Create", &shim.create_request())?;
    let before = open()?;
    for behaviour in [
        Behaviour::Refuses("device_add"),
        Behaviour::Refuses("add-fd"),
        Behaviour::DiesOn("blockdev-add"),
        Behaviour::Dies("no\n"),
        Behaviour::Babbles(b"hello\n"),
        Behaviour::Refuses("device_add"),
    ] {
        fake.behaviour(behaviour);
        client.refused("Create", &shim.create_request())?;
    }
    fake.settle()?;
    // The kernel takes some time to remove the tap devices of a VM that has ended.
    eventually(&format!("no more than {before} descriptors"), || Ok(open()? <= before))?;
    let shutdown = api::ShutdownRequest { id: shim.id.clone(), ..Default::default() };
    client.ok::<api::Empty>("Shutdown", &shutdown)?;
    fs::remove_dir_all(&shim.bundle)?;
    Ok(())
}

fn many_lives(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    for code in 0..20 {
        let output = run(containerd, &rootfs, &["sh", "-c", &format!("exit {code}")])?.output()?;
        ensure!(output.status == code, "should be {code}: {output}");
    }
    fake.settle()
}

/// The VM is made for the first container; a later one that asks for another VM is refused, and the pod is as before.
fn annotations_of_later_containers(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let config = |annotations: serde_json::Value| {
        rootfs.config(&["sleep", "1000"], |spec| spec["annotations"] = annotations)
    };
    let size = |vcpus: &str| json!({ "io.machinen.vcpus": vcpus, "io.machinen.memory-ceiling": "300" });
    let first = Served::run(containerd, &config(size("2"))?)?;
    for (annotations, words) in [
        (json!({ "io.machinen.memory-ceiling": "400" }), ["memory-ceiling", "400", "300 MiB"]),
        (size("3"), ["io.machinen.vcpus", "3", "runs with 2"]),
        (json!({ "io.machinen.kernel-args": "quiet" }), ["kernel-args", "quiet", "first container"]),
    ] {
        let later = first.in_same_vm(containerd, &config(annotations)?)?;
        let (code, message) = later.client.refused("Create", &later.shim.create_request())?;
        ensure!(code == Code::FAILED_PRECONDITION, "{code:?}: {message}");
        ensure!(words.iter().all(|word| message.contains(word)), "{message}");
        fs::remove_dir_all(&later.shim.bundle)?;
    }
    for annotations in [json!({}), size("2"), json!({ "io.machinen.rootdisk-size": "128" })] {
        let mut later = first.in_same_vm(containerd, &config(annotations)?)?;
        later.create(|_| ())?;
        later.begin()?;
        later.client.ok::<api::Empty>("Kill", &later.kill("", 9))?;
        later.wait("")?;
        later.client.ok::<api::DeleteResponse>("Delete", &later.delete(""))?;
        fs::remove_dir_all(&later.shim.bundle)?;
    }
    first.end()?;
    fake.settle()
}
