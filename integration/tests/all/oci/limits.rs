//! What is done to a running container: signals, pauses and other limits.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::mount, oci::Oci, runtime::Runtime};
use serde_json::{Value, json};

use super::{SLEEP, with_oci};

with_oci!(signals, all_processes, paused, updated, created_with_limits, too_little_memory);

fn signals(oci: &Oci) -> Result<()> {
    let script = "for s in HUP USR1 WINCH; do trap \"echo $s\" $s; done; trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    oci.bundle("k", &["sh", "-c", script], |_| {})?;
    let container = oci.launch("k")?;
    let pid = oci.pid("k")?;
    container.wait_for_stdout("ready\n")?;
    for (signal, name) in [("HUP", "HUP"), ("SIGUSR1", "USR1"), ("28", "WINCH")] {
        oci.ok(&["kill", "k", signal])?;
        container.wait_for_stdout(&format!("{name}\n"))?;
    }
    // It only asks whether the container runs.
    oci.ok(&["kill", "k", "0"])?;
    // Without a signal it is SIGTERM.
    oci.ok(&["kill", "k"])?;
    oci.wait(pid)?;
    oci.fails(&["kill", "k", "0"], 1, "container not running")?;
    oci.ok(&["delete", "k"]).map(drop)
}

/// A container in the PID namespace of another has no first process that takes the others along.
fn all_processes(oci: &Oci) -> Result<()> {
    oci.bundle("k", &["sh", "-c", "trap '' TERM; sleep 1000 & echo ready; wait"], |_| {})?;
    let container = oci.launch("k")?;
    let pid = oci.pid("k")?;
    container.wait_for_stdout("ready\n")?;
    oci.ok(&["kill", "--all", "k", "KILL"])?;
    oci.wait(pid)?;
    oci.ok(&["delete", "k"]).map(drop)
}

fn paused(oci: &Oci) -> Result<()> {
    oci.bundle("p", &["sh", "-c", "while read line; do echo got $line; done"], |_| {})?;
    let mut container = oci.launch("p")?;
    let mut stdin = container.stdin().context("it was asked for")?;
    stdin.write_all(b"one\n")?;
    container.wait_for_stdout("got one\n")?;
    oci.ok(&["pause", "p"])?;
    oci.has_status("p", "paused")?;
    oci.fails(&["exec", "p", "true"], 255, "cannot exec in a paused container")?;
    oci.fails(&["start", "p"], 1, "cannot start")?;
    stdin.write_all(b"two\n")?;
    oci.ok(&["resume", "p"])?;
    oci.has_status("p", "running")?;
    container.wait_for_stdout("got two\n")?;
    oci.ok(&["pause", "p"])?;
    // SIGKILL takes effect at once, or when the container continues.
    let pid = oci.pid("p")?;
    oci.ok(&["kill", "p", "KILL"])?;
    let _ended = oci.output(&["resume", "p"])?;
    oci.wait(pid)?;
    oci.ok(&["delete", "p"]).map(drop)
}

fn with_cgroup(spec: &mut Value) {
    let mounts = spec["mounts"].as_array_mut().expect("a list");
    mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]));
    spec["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "cgroup" }));
}

/// The files of either version of cgroups.
const SHOW: &str = "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2> /dev/null; \
                    cut -d ' ' -f 1 cpu.max cpu/cpu.cfs_quota_us 2> /dev/null; cat pids.max pids/pids.max 2> /dev/null; true";

fn updated(oci: &Oci) -> Result<()> {
    oci.bundle("u", &SLEEP, with_cgroup)?;
    let _container = oci.launch("u")?;
    oci.ok(&["update", "--memory", "100000000", "--pids-limit", "70", "u"])?;
    let limits = || oci.ok(&["exec", "u", "sh", "-c", SHOW]);
    let seen = limits()?;
    ensure!(seen.starts_with("99999744\n") && seen.ends_with("\n70\n"), "{seen}");
    let file = oci.file("resources.json");
    fs::write(
        &file,
        json!({ "cpu": { "quota": 30000, "period": 100_000 }, "pids": { "limit": 60 } }).to_string(),
    )?;
    oci.ok(&["update", "--resources", &file.display().to_string(), "u"])?;
    let seen = limits()?;
    ensure!(seen == "99999744\n30000\n60\n", "{seen}");
    // By the standard input.
    let mut update = oci.command(&["update", "--resources", "-", "u"])?.with_stdin().spawn()?;
    let mut stdin = update.stdin().context("it was asked for")?;
    stdin.write_all(br#"{"pids": {"limit": 50}}"#)?;
    drop(stdin);
    update.wait()?.ok()?;
    ensure!(limits()?.ends_with("\n50\n"), "{}", limits()?);
    fs::write(&file, "[]")?;
    oci.fails(&["update", "--resources", &file.display().to_string(), "u"], 1, "")?;
    oci.ok(&["delete", "--force", "u"]).map(drop)
}

fn created_with_limits(oci: &Oci) -> Result<()> {
    oci.bundle("l", &["sh", "-c", SHOW], |spec| {
        with_cgroup(spec);
        spec["linux"]["resources"] = json!({
            "memory": { "limit": 64 << 20 },
            "cpu": { "quota": 50000, "period": 100_000 },
            "pids": { "limit": 40 },
        });
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    })?;
    let output = oci.ok(&["run", "--bundle", &oci.bundle_dir("l"), "l"])?;
    ensure!(output == "67108864\n50000\n40\n", "{output}");
    Ok(())
}

/// The error names the limit, also where the kernel has killed the init for it.
fn too_little_memory(oci: &Oci) -> Result<()> {
    oci.bundle("l", &["true"], |spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 1000 } });
    })?;
    let output = oci.output(&["run", "--bundle", &oci.bundle_dir("l"), "l"])?;
    let text = output.error_text();
    ensure!(output.status == 1 && text.contains("memory limit") && text.contains("1000"), "{output}");
    super::is_gone(oci, "l")
}

/// The owner of the VM would stop in it for ever. runc refuses it since 1.2.
#[test]
fn a_frozen_cgroup() {
    super::run(Runtime::Machinen, refused_in_a_frozen_cgroup);
}

fn refused_in_a_frozen_cgroup(oci: &Oci) -> Result<()> {
    oci.bundle("z", &["true"], |_| {})?;
    let freezer = Path::new("/sys/fs/cgroup/freezer");
    let (mount, file, value) = match freezer.exists() {
        true => (freezer, "freezer.state", "FROZEN"),
        false => (Path::new("/sys/fs/cgroup"), "cgroup.freeze", "1"),
    };
    let group = mount.join(oci.host().name()).join("z");
    fs::create_dir_all(&group)?;
    fs::write(group.join(file), value)?;
    let output = oci.output(&["run", "--bundle", &oci.bundle_dir("z"), "z"]);
    fs::remove_dir(&group)?;
    let output = output?;
    let is_told = output.error_text().contains("container's cgroup unexpectedly frozen");
    ensure!(output.status == 1 && is_told, "{output}");
    super::is_gone(oci, "z")
}

/// A process that the guest's kernel has killed for lack of memory is an event, as with runc.
#[test]
fn out_of_memory() {
    super::run(Runtime::Machinen, |oci| {
        oci.bundle("o", &SLEEP, |spec| {
            spec["linux"]["resources"] = json!({ "memory": { "limit": 32 << 20 } });
        })?;
        let _container = oci.launch("o")?;
        let events = oci.command(&["events", "--interval", "200ms", "o"])?.spawn()?;
        events.wait_for_stdout("\"type\":\"stats\"")?;
        let script = "x=$(dd if=/dev/urandom bs=1M count=60 2> /dev/null | tr '\\0' x)";
        ensure!(oci.output(&["exec", "o", "sh", "-c", script])?.status != 0, "it was not killed");
        events.wait_for_stdout(r#"{"type":"oom","id":"o"}"#)?;
        oci.ok(&["delete", "--force", "o"]).map(drop)
    });
}

/// A container whose configuration names no cgroup has one on the host anyway, which has its limits.
#[test]
fn no_cgroup_is_named() {
    super::run(Runtime::Machinen, |oci| {
        let id = format!("{}-group", oci.host().name());
        oci.bundle(&id, &SLEEP, |spec| {
            spec["linux"]["resources"] = json!({ "memory": { "limit": 64 << 20 } });
            spec["linux"].as_object_mut().expect("an object").remove("cgroupsPath");
        })?;
        let _container = oci.launch(&id)?;
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", oci.pid(&id)?))?;
        let path = format!("/machinen/{id}");
        ensure!(groups.lines().any(|line| line.ends_with(&path)), "not in {path}: {groups}");
        let root = Path::new("/sys/fs/cgroup");
        let dirs = [root.join("memory"), root.to_owned()].map(|mount| mount.join(&path[1..]));
        let files = ["memory.limit_in_bytes", "memory.max"];
        let mut limits =
            dirs.iter().zip(files).filter_map(|(dir, file)| fs::read_to_string(dir.join(file)).ok());
        let limit: u64 = limits.next().context("no limit")?.trim().parse()?;
        ensure!((64 << 20..8 << 30).contains(&limit), "{limit}");
        oci.ok(&["delete", "--force", &id])?;
        ensure!(dirs.iter().all(|dir| !dir.exists()), "the group is left");
        Ok(())
    });
}
