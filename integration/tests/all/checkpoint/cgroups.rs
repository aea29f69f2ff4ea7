//! Cgroups that a container has made below its own, with their controllers, limits, owners and processes.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
};
use serde_json::{Value, json};

use super::{checkpoint, moved};
use crate::harness::on_newest_containerd;

on_newest_containerd!(below_a_namespace, without_a_namespace, with_a_copy_ahead, more_than_can_be_kept);

/// The first process moves into a child cgroup and enables controllers, as systemd and dockerd do. The root
/// of the hierarchy depends on the namespace. A child that is frozen before it has executed its command would not
/// be found by its name.
const MAKE: &str = "c=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cd $c; mkdir init work work/deep idle; \
                    echo $$ >init/cgroup.procs; \
                    until echo '+memory +pids +cpu' >cgroup.subtree_control; do usleep 10000; done; \
                    echo '+memory +pids' >work/cgroup.subtree_control; \
                    echo 64M >work/memory.max; echo 33 >work/deep/pids.max; echo 300 >idle/cpu.weight; \
                    echo 1 >idle/memory.oom.group; chown 1000 work/cgroup.procs work; \
                    (cd /; exec sleep 7777) & echo $! >work/deep/cgroup.procs; \
                    (cd /; exec sleep 8888) & echo $! >idle/cgroup.procs; \
                    until grep -q sleep /proc/$!/comm; do usleep 10000; done; \
                    echo 1 >idle/cgroup.freeze; touch /dev/shm/made; cd /; exec sleep 9999";
/// Prints paths below the container's cgroup, and only values that another start would not change. A process
/// that waited in the cgroup itself would keep the first process from enabling controllers.
const LOOK: &str = "c=/sys/fs/cgroup$(cut -d: -f3 /proc/1/cgroup); c=${c%/init}; mkdir -p $c/init; \
                    echo $$ >$c/init/cgroup.procs; \
                    until [ -e /dev/shm/made ]; do usleep 50000; done; cd $c; \
                    for f in cgroup.subtree_control work/cgroup.subtree_control work/memory.max work/deep/pids.max \
                    idle/cpu.weight idle/memory.oom.group idle/cgroup.freeze; do echo $f $(cat $f); done; \
                    stat -c '%n %u' work work/cgroup.procs idle; \
                    for p in self $(pidof sleep); do echo $(tr '\\0' ' ' </proc/$p/cmdline | cut -c1-10) \
                    $(cut -d: -f3 /proc/$p/cgroup | sed 's,^/machinen/[^/]*,,'); done | sort";
/// A process in the limited cgroup that uses more memory than the limit.
const LIMIT: &str = "c=/sys/fs/cgroup$(cut -d: -f3 /proc/1/cgroup); cd ${c%/init}; echo $$ >work/deep/cgroup.procs; \
                     head -c 200m /dev/zero | tail -c 199m >/dev/null; echo $?";

fn below_a_namespace(containerd: &mut Containerd) -> Result<()> {
    restored_as_it_was(containerd, true, &config(containerd, MAKE, true)?)
}

fn without_a_namespace(containerd: &mut Containerd) -> Result<()> {
    restored_as_it_was(containerd, false, &config(containerd, MAKE, false)?)
}

/// One of the cgroups is frozen, so memory is not copied ahead, and the checkpoint is made without that copy.
fn with_a_copy_ahead(containerd: &mut Containerd) -> Result<()> {
    let path = config(containerd, MAKE, true)?;
    let mut spec: Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["annotations"] = json!({"io.machinen.pre-dump": "true"});
    fs::write(&path, spec.to_string())?;
    let running = Served::run(containerd, &path)?;
    output(&running, LOOK)?;
    let dir = containerd.root().join("images");
    checkpoint(&running, &dir)?;
    let log = running.shim.log()?;
    let reason = "cannot copy memory ahead of a checkpoint";
    let line = log.lines().find(|line| line.contains(reason)).context("memory was copied ahead")?;
    ensure!(line.contains("the container has frozen its cgroup idle"), "{line}");
    running.end()?;
    fs::remove_dir_all(&dir)?;
    restored_as_it_was(containerd, true, &path)
}

fn restored_as_it_was(containerd: &Containerd, has_namespace: bool, config: &Path) -> Result<()> {
    let mut running = Served::run(containerd, config)?;
    let before = output(&running, LOOK)?;
    for set in [
        "work/memory.max 67108864",
        "work/deep/pids.max 33",
        "idle/cpu.weight 300",
        "idle/cgroup.freeze 1",
        "work/cgroup.procs 1000",
        "sleep 7777 /work/deep",
        "sleep 8888 /idle",
    ] {
        ensure!(before.contains(set), "{set:?} was not set:\n{before}");
    }
    ensure!(has_namespace == (output(&running, "cat /proc/1/cgroup")? == "0::/init\n"), "{before}");
    for round in 1..=2 {
        running = moved(containerd, &running, config)?;
        let after = output(&running, LOOK)?;
        ensure!(after == before, "restore {round}: before\n{before}\nafter\n{after}");
    }
    let limited = output(&running, LIMIT)?;
    ensure!(limited.ends_with("137\n"), "the limit below does not hold: {limited}");
    running.end()
}

fn more_than_can_be_kept(containerd: &mut Containerd) -> Result<()> {
    let script = "cd /sys/fs/cgroup; mkdir $(seq 1200); touch /dev/shm/made; while :; do sleep 1; done";
    let source = Served::run(containerd, &config(containerd, script, true)?)?;
    output(&source, "until [ -e /dev/shm/made ]; do usleep 50000; done")?;
    let dir = containerd.root().join("images");
    let (code, message) = super::refused(&source.client, &super::request(&source, &dir, None)?)?;
    ensure!(
        code == ttrpc::Code::FAILED_PRECONDITION && message.contains("cgroups below it"),
        "{code:?}: {message}"
    );
    ensure!(!dir.exists() || fs::read_dir(&dir)?.next().is_none(), "half a checkpoint is left");
    source.end()
}

/// With a cgroup namespace, the configuration mounts cgroups; without one, the container mounts them itself.
fn config(containerd: &Containerd, script: &str, has_namespace: bool) -> Result<std::path::PathBuf> {
    let script = match has_namespace {
        true => script.to_owned(),
        false => format!("mount -t cgroup2 none /sys/fs/cgroup; {script}"),
    };
    Bundle::busybox(containerd)?.config(&["sh", "-c", &script], |spec| {
        if has_namespace {
            let mounts = spec["mounts"].as_array_mut().expect("an array");
            mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["rw", "nosuid", "noexec", "nodev"]));
            return;
        }
        for set in ["bounding", "effective", "permitted"] {
            let capabilities = spec["process"]["capabilities"][set].as_array_mut().expect("an array");
            capabilities.push(json!("CAP_SYS_ADMIN"));
        }
    })
}

/// The output of a shell script in the container.
fn output(served: &Served<'_>, script: &str) -> Result<String> {
    Ok(served.shell(script)?.1)
}
