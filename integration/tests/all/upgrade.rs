//! An upgrade of machinen while containers run: the shim on disk is replaced, as a package manager does it.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, paths, setup::Setup};

use crate::harness::{IMAGE, NEWEST, run_with};

const SHIM: &str = "containerd-shim-machinen-v1";

#[test]
fn a_shim_serves_its_container_after_it_was_replaced() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    install(dir.path()).expect("a shim to install");
    run_with(NEWEST, &Setup::new().programs(dir.path()), |containerd| {
        outlives_its_file(containerd, dir.path())
    });
}

/// A new file takes the name of the old one.
fn install(dir: &Path) -> Result<()> {
    let (new, installed) = (dir.join("new"), dir.join(SHIM));
    fs::copy(paths::release_dir()?.join(SHIM), &new)?;
    fs::rename(&new, installed)?;
    Ok(())
}

fn outlives_its_file(containerd: &mut Containerd, dir: &Path) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let server = server(containerd, &id)?;
    ensure!(program(server)? == dir.join(SHIM).display().to_string(), "another shim serves {id}");
    install(dir)?;
    let gone = format!("{} (deleted)", dir.join(SHIM).display());
    ensure!(program(server)? == gone, "the shim was not replaced");

    let added = containerd.ctr_ok(&["tasks", "exec", "--exec-id", "added", &id, "echo", "served"])?;
    ensure!(added == "served\n", "{added:?}");
    containerd.ctr_ok(&["tasks", "pause", &id])?;
    containerd.ctr_ok(&["tasks", "resume", &id])?;
    containerd.ctr_ok(&["tasks", "metrics", &id])?;
    let images = dir.join("checkpoint");
    containerd.ctr_ok(&["tasks", "checkpoint", "--image-path", &images.display().to_string(), &id])?;
    ensure!(images.join("machinen.json").exists(), "there is no checkpoint");
    // A new container is served by the new shim, next to the old one.
    containerd.run(IMAGE, &["true"]).ok()?;
    ensure!(program(server)? == gone, "{id} has another server now");

    containerd.end(&id)
}

/// The shim of a container.
fn server(containerd: &Containerd, id: &str) -> Result<u32> {
    let inventory = containerd.inventory()?;
    let serves = |command: &str| command.contains(SHIM) && command.contains(&format!("-id {id}"));
    let server = inventory.processes.iter().find(|process| serves(&process.command));
    Ok(server.with_context(|| format!("no server of {id} in\n{inventory}"))?.pid)
}

fn program(pid: u32) -> Result<String> {
    Ok(fs::read_link(format!("/proc/{pid}/exe"))?.display().to_string())
}
