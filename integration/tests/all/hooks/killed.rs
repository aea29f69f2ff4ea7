//! Hooks of a shim that is killed, and of a containerd that starts again: none is lost, and none runs twice.

use std::fs;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{containerd::Containerd, process::wait_for_end, served::Served};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use super::HookLog;
use crate::{
    fake::fake,
    harness::{on_every_containerd, on_newest_containerd},
};

on_every_containerd!(restart_of_containerd, a_killed_shim);
on_newest_containerd!(a_pods_shim_is_killed, killed_in_a_hook);

const ALIVE: [&str; 4] = ["prestart", "createRuntime", "createContainer", "poststart"];
const DELETED: [&str; 5] = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];

fn restart_of_containerd(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| spec["hooks"] = log.of_all_kinds())?;
    let run = containerd.run_spec(&config).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    containerd.restart()?;
    ensure!(containerd.ctr_ok(&["tasks", "list"])?.contains("RUNNING"));
    log.has_run(&ALIVE)?;
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &id])?;
    containerd.ctr_output(&["tasks", "delete", &id])?;
    containerd.ctr_ok(&["containers", "delete", &id])?;
    log.has_run(&DELETED)?;
    fake.settle()
}

/// containerd runs the shim's `delete` itself.
fn a_killed_shim(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| spec["hooks"] = log.of_all_kinds())?;
    let run = containerd.run_spec(&config).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let pid = fs::read_to_string(containerd.bundle(&id).join("shim.pid")).context("no shim")?;
    let from = containerd.log().position();
    kill(Pid::from_raw(pid.trim().parse()?), Signal::SIGKILL)?;
    containerd.log().wait_for(from, |line| line.contains("shim disconnected") && line.contains(&id))?;
    containerd.ctr_output(&["tasks", "delete", "--force", &id])?;
    containerd.ctr_ok(&["containers", "delete", &id])?;
    log.has_run(&DELETED)?;
    fake.settle()
}

/// `delete` of the pod's first bundle runs the poststop hooks of every container that is left, once.
fn a_pods_shim_is_killed(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let logs = [HookLog::new(containerd)?, HookLog::new(containerd)?, HookLog::new(containerd)?];
    let config = |log: &HookLog| rootfs.config(&["sleep", "1000"], |spec| spec["hooks"] = log.of_all_kinds());
    let first = Served::run(containerd, &config(&logs[0])?)?;
    let mut others = Vec::new();
    for log in &logs[1..] {
        let mut other = first.in_same_vm(containerd, &config(log)?)?;
        other.create(|_| ())?;
        other.begin()?;
        others.push(other);
    }
    others[0].client.ok::<api::Empty>("Kill", &others[0].kill("", 9))?;
    others[0].wait("")?;
    others[0].client.ok::<api::DeleteResponse>("Delete", &others[0].delete(""))?;
    logs[1].has_run(&DELETED)?;
    kill_server(&first)?;
    for _ in 0..2 {
        let (printed, _) = first.shim.delete()?;
        ensure!(printed.status == 0 && printed.stderr.is_empty(), "{printed:?}");
        logs.iter().try_for_each(|log| log.has_run(&DELETED))?;
    }
    for served in others.iter().chain([&first]) {
        fs::remove_dir_all(&served.shim.bundle)?;
    }
    fake.settle()
}

/// A poststop hook that has begun is not repeated, and those after it are not lost. One that does not end is killed
/// before containerd gives `delete` up.
fn killed_in_a_hook(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let log = HookLog::new(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |spec| {
        let endless =
            |name: &str| log.hook_with(name, &format!("echo > {}/begun; exec sleep 1000", log.dir.display()));
        spec["hooks"] = json!({ "poststop": [endless("one"), log.hook("two"), endless("three")] });
    })?;
    nix::unistd::mkfifo(&log.dir.join("begun"), nix::sys::stat::Mode::S_IRWXU)?;
    let served = Served::run(containerd, &config)?;
    served.client.ok::<api::Empty>("Kill", &served.kill("", 9))?;
    served.wait("")?;
    std::thread::scope(|scope| -> Result<()> {
        let deleting =
            scope.spawn(|| served.client.call::<api::DeleteResponse>("Delete", &served.delete("")));
        fs::read(log.dir.join("begun"))?;
        kill_server(&served)?;
        let answer = deleting.join().expect("calling does not panic");
        ensure!(answer.is_err(), "Delete was answered: {answer:?}");
        Ok(())
    })?;
    log.has_run(&["one"])?;
    // Nothing reads the fifo now: the third hook does not end.
    let begun = std::time::Instant::now();
    let (printed, _) = served.shim.delete()?;
    ensure!(printed.status == 0 && printed.stderr.contains("poststop hook 3"), "{printed:?}");
    ensure!(begun.elapsed().as_secs() < 5, "delete took {:?}", begun.elapsed());
    log.has_run(&["one", "two", "three"])?;
    fs::remove_dir_all(&served.shim.bundle)?;
    fake.settle()
}

fn kill_server(served: &Served<'_>) -> Result<()> {
    let connect = api::ConnectRequest { id: served.shim.id.clone(), ..Default::default() };
    let connected: api::ConnectResponse = served.client.ok("Connect", &connect)?;
    kill(Pid::from_raw(connected.shim_pid.cast_signed()), Signal::SIGKILL)?;
    ensure!(wait_for_end(connected.shim_pid, std::time::Duration::from_secs(10))?, "the shim still runs");
    Ok(())
}
