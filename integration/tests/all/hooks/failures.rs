//! Hooks that fail: the request fails with the hook's words, everything is undone, and the poststop hooks run.

use std::fs;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::{Value, json};
use ttrpc::Code;

use super::{HookLog, shell};
use crate::{
    fake::fake,
    harness::{fails_saying, on_newest_containerd},
};

on_newest_containerd!(at_create, at_create_next_to_another_container, at_start, in_the_guest, without_end);

fn failing(log: &HookLog) -> Value {
    log.hook_with("failing", "echo the cause >&2; exit 3")
}

/// The specification of a container whose last hook of `kind` fails.
fn with_failing(log: &HookLog, kind: &str) -> impl FnOnce(&mut Value) {
    let hooks = json!({
        kind: [log.hook("before"), failing(log), log.hook("never")],
        "poststop": [failing(log), log.hook("poststop")],
    });
    move |spec| spec["hooks"] = hooks
}

fn at_create(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let log = HookLog::new(containerd)?;
        let config = rootfs.config(&["sleep", "1000"], with_failing(&log, kind))?;
        let run = containerd.run_spec(&config);
        let words = [kind, "hook 2", "/bin/sh", "exited with status 3", "the cause"];
        fails_saying(containerd, &run, &words)?;
        log.has_run(&["before", "failing", "failing", "poststop"])?;
        fake.settle()?;
    }
    let plain = rootfs.config(&["echo", "well"], |_| ())?;
    ensure!(containerd.run_spec(&plain).ok()? == "well\n");
    fake.settle()
}

/// The VM stays, with everything of the other container.
fn at_create_next_to_another_container(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let first = Served::run(containerd, &rootfs.config(&["sleep", "1000"], |_| ())?)?;
    let disks = fake.disks()?.len();
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], with_failing(&log, "createRuntime"))?;
    let later = first.in_same_vm(containerd, &config)?;
    let before = containerd.inventory()?;
    let (code, message) = later.client.refused("Create", &later.shim.create_request())?;
    ensure!(code == Code::INTERNAL && message.contains("the cause"), "{code:?}: {message}");
    log.has_run(&["before", "failing", "failing", "poststop"])?;
    containerd.settle(&before)?;
    ensure!(fake.disks()?.len() == disks, "disks are left: {:?}", fake.disks()?);
    let (status, output) = first.shell("echo well")?;
    ensure!(status == 0 && output == "well\n", "{status}: {output}");
    fs::remove_dir_all(&later.shim.bundle)?;
    first.end()?;
    fake.settle()
}

/// The container runs in spite of its poststart hook, and the log has the reason.
fn at_start(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        spec["hooks"] = json!({ "poststart": [failing(&log), log.hook("after")] });
    })?;
    let served = Served::run(containerd, &config)?;
    log.has_run(&["failing", "after"])?;
    ensure!(served.shim.log()?.contains("the cause"), "{}", served.shim.log()?);
    served.is("", api::Status::RUNNING, served.pid)?;
    served.end()?;
    fake.settle()
}

fn in_the_guest(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    for (hook, code, words) in [
        (shell("echo the cause >&2; sleep 1000 & exit 3"), Code::INTERNAL, "exited with status 3: the cause"),
        (json!({ "path": "/no/such/hook" }), Code::INTERNAL, "/no/such/hook"),
        (
            json!({ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }),
            Code::DEADLINE_EXCEEDED,
            "not ended within 1s",
        ),
    ] {
        let log = HookLog::new(containerd)?;
        let config = rootfs.config(&["touch", "/ran"], |spec| {
            spec["hooks"] =
                json!({ "startContainer": [shell("true"), hook], "poststop": [log.hook("poststop")] });
        })?;
        let mut served = Served::of(containerd, &config)?;
        served.create(|_| ())?;
        let (refusal, message) = served.client.refused("Start", &served.start(""))?;
        ensure!(refusal == code, "{refusal:?}: {message}");
        ensure!(message.contains("startContainer hook 2") && message.contains(words), "{message}");
        let ended = served.wait("")?;
        ensure!(ended.exit_status == 137, "{ended:?}");
        log.has_run(&[])?;
        served.end_stopped()?;
        log.has_run(&["poststop"])?;
    }
    Ok(())
}

/// A hook that does not end is killed with all processes of its group, and other requests are answered meanwhile.
fn without_end(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        let mut hook = log.hook_with("endless", "sleep 1000 & wait");
        hook["timeout"] = json!(2);
        spec["hooks"] = json!({ "createRuntime": [hook], "poststop": [log.hook("poststop")] });
    })?;
    let served = Served::of(containerd, &config)?;
    let before = containerd.inventory()?;
    let (code, message) = served.client.refused("Create", &served.shim.create_request())?;
    ensure!(
        code == Code::DEADLINE_EXCEEDED && message.contains("not ended within 2s"),
        "{code:?}: {message}"
    );
    log.has_run(&["endless", "poststop"])?;
    let console = served.shim.bundle.join("vm");
    if console.exists() {
        fs::remove_dir_all(console)?;
    }
    containerd.settle(&before).context("the hook's own process is left")?;
    served.shim.shut_down(&served.client)?;
    fake.settle()
}
