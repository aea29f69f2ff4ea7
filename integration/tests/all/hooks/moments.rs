//! Hooks that succeed: their order, their moments, their namespaces and their input.

use std::fs;

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
    setup::{self, Setup},
};
use serde_json::{Value, json};

use super::{HookLog, shell};
use crate::{checkpoint::checkpoint, fake::fake, harness::on_newest_containerd};

on_newest_containerd!(
    in_order_in_a_booted_and_a_cloned_vm,
    in_the_guest,
    of_a_restored_container,
    of_two_containers_of_a_pod,
    outside_of_the_pods_cgroup,
);

const AT_CREATE: [&str; 3] = ["prestart", "createRuntime", "createContainer"];

fn in_order_in_a_booted_and_a_cloned_vm(containerd: &mut Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("template", "mode", setup::Value::text("off")))?;
    in_order(containerd)?;
    containerd.configure(&Setup::new())?;
    in_order(containerd)
}

fn in_order(containerd: &Containerd) -> Result<()> {
    let log = HookLog::new(containerd)?;
    let rootfs = Bundle::busybox(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        spec["hooks"] = log.of_all_kinds();
        spec["annotations"] = json!({ "nerdctl/network-namespace": "/run/netns/none", "a": "" });
    })?;
    let mut served = Served::of(containerd, &config)?;
    served.create(|_| ())?;
    log.has_run(&AT_CREATE)?;
    served.is("", api::Status::CREATED, served.pid)?;
    served.begin()?;
    log.has_run(&[&AT_CREATE[..], &["poststart"]].concat())?;
    let host = fs::read_link("/proc/self/ns/net")?.display().to_string();
    let own = fs::read_link(format!("/proc/{}/ns/net", served.pid))?.display().to_string();
    for line in log.lines()? {
        let in_container = line[0] == "createContainer";
        ensure!(line[1] == if in_container { &own } else { &host }[..] && line[2] == own, "{line:?}");
    }
    for (name, status) in
        [("prestart", "creating"), ("createContainer", "creating"), ("poststart", "running")]
    {
        let expected = state(&served, status, Some(served.pid));
        ensure!(log.state(name)? == expected, "{name}: {}", log.state(name)?);
    }
    served.end()?;
    log.has_run(&[&AT_CREATE[..], &["poststart", "poststop"]].concat())?;
    ensure!(log.state("poststop")? == state(&served, "stopped", None), "{}", log.state("poststop")?);
    Ok(())
}

fn state(served: &Served<'_>, status: &str, pid: Option<u32>) -> Value {
    let mut state = json!({
        "ociVersion": "1.2.0", "id": served.shim.id, "status": status, "bundle": served.shim.bundle,
        "annotations": { "nerdctl/network-namespace": "/run/netns/none", "a": "" },
    });
    if let Some(pid) = pid {
        state["pid"] = pid.into();
    }
    state
}

/// The hooks see the container's files and processes, run as its user, and have ended before its command runs.
fn in_the_guest(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let report = "cat > /hooks/state; id -u > /hooks/id; pwd >> /hooks/id; env | grep -c HOME= >> /hooks/id; \
                  tr '\\0' ' ' < /proc/1/cmdline > /hooks/init; readlink /proc/self/ns/pid > /hooks/ns";
    let config = rootfs.config(&["sh", "-c", "ls /hooks > /hooks/before; exec sleep 1000"], |spec| {
        spec["hooks"] = json!({ "startContainer": [shell(report), shell("echo second > /hooks/second")] });
        spec["process"]["user"] = json!({ "uid": 7, "gid": 7 });
        spec["process"]["cwd"] = json!("/hooks");
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount("/hooks", "tmpfs", "tmpfs", &["mode=777"]));
        }
    })?;
    let mut served = Served::of(containerd, &config)?;
    served.create(|_| ())?;
    let (_, files) = served.shell("ls /hooks")?;
    ensure!(files.is_empty(), "hooks of the start have run at the creation: {files}");
    served.begin()?;
    let read = |name: &str| -> Result<String> { Ok(served.shell(&format!("cat /hooks/{name}"))?.1) };
    ensure!(read("id")? == "7\n/hooks\n0\n", "{}", read("id")?);
    ensure!(read("second")? == "second\n" && read("before")?.contains("second"), "{}", read("before")?);
    let (_, namespace) = served.shell("readlink /proc/self/ns/pid")?;
    ensure!(read("ns")? == namespace, "{} is not {namespace}", read("ns")?);
    ensure!(!read("init")?.contains("sleep"), "the command ran before the hook: {}", read("init")?);
    let state: Value = serde_json::from_str(&read("state")?)?;
    let expected = json!({
        "ociVersion": "1.2.0", "id": served.shim.id, "status": "created", "pid": 1, "bundle": served.shim.bundle,
    });
    ensure!(state == expected, "{state}");
    served.end()
}

fn of_a_restored_container(containerd: &mut Containerd) -> Result<()> {
    let rootfs = Bundle::busybox(containerd)?;
    let plain = rootfs.config(&["sleep", "1000"], |_| ())?;
    let source = Served::run(containerd, &plain)?;
    let dir = containerd.root().join("checkpoint");
    checkpoint(&source, &dir)?;
    source.end()?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        spec["hooks"] = log.of_all_kinds();
        spec["hooks"]["startContainer"] = json!([shell("cat > /hook-in-guest")]);
    })?;
    let restored = Served::restored(containerd, &config, &dir)?;
    log.has_run(&[&AT_CREATE[..], &["poststart"]].concat())?;
    let (status, state) = restored.shell("cat /hook-in-guest; ps | grep -q '[s]leep 1000'")?;
    ensure!(status == 0 && state.contains("\"pid\":1"), "{status}: {state}");
    restored.end()?;
    log.has_run(&[&AT_CREATE[..], &["poststart", "poststop"]].concat())
}

/// The poststop hooks of one container run when it is deleted, and not when the other one is.
fn of_two_containers_of_a_pod(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let (one, two) = (HookLog::new(containerd)?, HookLog::new(containerd)?);
    let config = |log: &HookLog| rootfs.config(&["sleep", "1000"], |spec| spec["hooks"] = log.of_all_kinds());
    let first = Served::run(containerd, &config(&one)?)?;
    let mut second = first.in_same_vm(containerd, &config(&two)?)?;
    second.create(|_| ())?;
    second.begin()?;
    let alive = [&AT_CREATE[..], &["poststart"]].concat();
    let deleted = [&AT_CREATE[..], &["poststart", "poststop"]].concat();
    ensure!(one.lines()?[0][2] != two.lines()?[0][2], "both have one network namespace");
    second.client.ok::<api::Empty>("Kill", &second.kill("", 9))?;
    second.wait("")?;
    two.has_run(&alive)?;
    second.client.ok::<api::DeleteResponse>("Delete", &second.delete(""))?;
    two.has_run(&deleted)?;
    one.has_run(&alive)?;
    fs::remove_dir_all(&second.shim.bundle)?;
    first.end()?;
    one.has_run(&deleted)?;
    fake.settle()
}

/// A hook runs where the shim came from, so that a daemon that the hook starts neither counts for the pod nor ends with it.
fn outside_of_the_pods_cgroup(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let group = format!("machinen-test-{}", containerd.namespace());
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        let save = format!("cat /proc/self/cgroup > {}/cgroup", log.dir.display());
        spec["hooks"] = json!({ "createRuntime": [log.hook_with("createRuntime", &save)] });
        spec["linux"]["cgroupsPath"] = json!(format!("/{group}/pod"));
    })?;
    let served = Served::run(containerd, &config)?;
    let of_hook = fs::read_to_string(log.dir.join("cgroup"))?;
    let of_anchor = fs::read_to_string(format!("/proc/{}/cgroup", served.pid))?;
    let of_containerd = fs::read_to_string(format!("/proc/{}/cgroup", containerd.pid()))?;
    ensure!(of_anchor.contains(&group) && of_hook == of_containerd, "{of_hook}, not {of_containerd}");
    served.end()?;
    fake.settle()
}
