//! Containers of other managers: containerd's and Podman's.

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    image::Image,
    podman::{Podman, PodmanCommands as _, Version},
    runtime::Runtime,
};

use serde_json::Value;

use super::{json, seen::row};
use crate::{
    fork::{fork, sh},
    harness::{IMAGE, on_newest_containerd},
};

on_newest_containerd!(of_containerd, whose_shim_does_not_answer);

fn of_containerd(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", "echo x > /f; sleep 1234"]).detached().flag("--null-io");
    run.ok()?;
    let (id, new) = (run.container().to_owned(), containerd.new_id());
    let machinen = |args: &[&str]| -> Result<String> { Ok(containerd.machinen(args)?.run()?.ok()?.text()) };
    let one = own_row(containerd, &machinen(&["ls", "--format", "json"])?, &id)?;
    ensure!(one["owner"] == "containerd", "{one}");
    ensure!(one["image"] == IMAGE && one["status"] == "running" && one["vm"]["pss"].is_u64(), "{one}");
    // Its command has been executed.
    sh(containerd, &id, "until [ -s /f ]; do usleep 50000; done")?;
    let whole = format!("{}/{id}", containerd.namespace());
    ensure!(machinen(&["top", &whole])?.contains("sleep 1234"));
    let copy = containerd.root().join("copied").display().to_string();
    machinen(&["cp", &format!("{whole}:/f"), &copy])?;
    ensure!(std::fs::read_to_string(&copy)? == "x\n");
    let refused = |verb: &str, text: &str| -> Result<()> {
        let output = containerd.machinen(&[verb, &whole])?.run()?;
        ensure!(output.status == 1 && output.error_text().contains(text), "{output}");
        Ok(())
    };
    refused("logs", "the client of containerd")?;
    refused("attach", &format!("use `ctr --namespace {} tasks attach {id}`", containerd.namespace()))?;
    machinen(&["secret", &whole, "KEY=hush"])?;
    fork(containerd, &[&id, &new])?;
    // A fork continues from a checkpoint, which has no secrets.
    ensure!(sh(containerd, &id, "cat /run/secrets/KEY")? == "hush");
    ensure!(sh(containerd, &new, "ls -A /run/secrets && grep -c secrets /proc/mounts")? == "1");
    ensure!(own_row(containerd, &machinen(&["ls", "--format", "json"])?, &new)?["forkedFrom"] == id.as_str());
    for id in [&id, &new] {
        containerd.task(id).kill()?;
        containerd.task(id).delete(137)?;
    }
    Ok(())
}

/// The container of this containerd; other tests have containers with the same id.
fn own_row(containerd: &Containerd, text: &str, id: &str) -> Result<Value> {
    let all = json(text)?;
    let is_own = |row: &&Value| row["id"] == id && row["namespace"] == containerd.namespace();
    let row = all.as_array().and_then(|all| all.iter().find(is_own)).cloned();
    row.with_context(|| format!("no {id} in {text}"))
}

/// It is listed, and does not hinder the list.
fn whose_shim_does_not_answer(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    run.ok()?;
    let id = run.container().to_owned();
    let bundle = containerd.bundle(&id);
    let pid: i32 = std::fs::read_to_string(bundle.join("shim.pid"))?.trim().parse().context("no pid")?;
    let stopped = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP);
    stopped.context("cannot stop the shim")?;
    let output = containerd.machinen(&["ls", "--format", "json"])?.run()?.ok()?;
    let lost = own_row(containerd, &output.text(), &id)?;
    ensure!(
        lost["status"] == "lost" && lost["problem"].as_str().is_some_and(|it| it.contains("answer")),
        "{lost}"
    );
    let running = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGCONT);
    running.context("cannot continue the shim")?;
    containerd.task(&id).kill()?;
    containerd.task(&id).delete(137)
}

#[test]
fn of_podman() {
    let podman = Podman::start(Version::V5, Runtime::Machinen).unwrap_or_else(|error| panic!("{error:#}"));
    listed_with_its_name(&podman).unwrap_or_else(|error| panic!("{error:#}"));
}

fn listed_with_its_name(podman: &Podman) -> Result<()> {
    podman.load(&Image::busybox()?)?;
    let id = podman.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        "echo said; sleep 1234",
    ])?;
    let id = id.trim();
    let machinen = |args: &[&str]| -> Result<String> {
        let program = machinen_integration::paths::release_dir()?.join("machinen");
        Ok(podman.host().program(program)?.args(args).run()?.ok()?.text())
    };
    let one = row(&machinen(&["ls", "--format", "json"])?, id)?;
    ensure!(one["owner"] == "podman" && one["name"] == "web" && one["status"] == "running", "{one}");
    let program = machinen_integration::paths::release_dir()?.join("machinen");
    let mut following = podman.host().program(program)?.args(["logs", "--follow", "web"]).spawn()?;
    following.wait_for_stdout("said\n")?;
    ensure!(machinen(&["top", id])?.contains("sleep 1234"));
    let program = machinen_integration::paths::release_dir()?.join("machinen");
    let attached = podman.host().program(program)?.args(["attach", "web"]).run()?;
    ensure!(attached.status == 1 && attached.error_text().contains("use `podman attach web`"), "{attached}");
    let copy = podman.host().root().join("tmp/copied").display().to_string();
    machinen(&["cp", "web:/etc/passwd", &copy])?;
    ensure!(std::fs::read_to_string(&copy)?.starts_with("root:"));
    machinen(&["secret", "web", "KEY=hush"])?;
    ensure!(podman.ok(&["exec", "web", "cat", "/run/secrets/KEY"])? == "hush");
    let program = machinen_integration::paths::release_dir()?.join("machinen");
    let ports = podman.host().program(program)?.args(["port", "web"]).run()?;
    ensure!(ports.status == 1 && ports.error_text().contains("podman port"), "{ports}");
    podman.ok(&["rm", "--force", "--time", "0", "web"])?;
    // It ends with conmon.
    ensure!(following.wait_for_exit()? == 0, "{:?}", following.written());
    Ok(())
}
