//! What a container has written becomes an image, an archive or a list of changes, and images are built.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    podman::{Podman, PodmanCommands as _},
    process::Invocation,
};

use super::{remove, script, start, with_podman};
use crate::harness::IMAGE;

with_podman!(
    commit_and_diff,
    committed_while_it_runs,
    copied_after_its_end,
    copied_while_it_runs,
    exported,
    a_build
);

fn commit_and_diff(podman: &Podman) -> Result<()> {
    let text = "echo written > /written; mkdir -p /made/inside; rm /etc/passwd";
    podman.ok(&["run", "--name", "source", "--network", "none", IMAGE, "sh", "-c", text])?;
    let changes = podman.ok(&["diff", "source"])?;
    for wanted in ["A /written", "D /etc/passwd", "A /made", "A /made/inside"] {
        ensure!(changes.lines().any(|line| line == wanted), "no {wanted:?} in\n{changes}");
    }
    podman.ok(&["commit", "--change", "CMD [\"cat\", \"/written\"]", "source", "committed"])?;
    let output = podman.ok(&["run", "--rm", "--network", "none", "committed"])?;
    ensure!(output == "written", "{output}");
    // The container continues with its own files when it is started again.
    podman.ok(&["start", "source"])?;
    ensure!(podman.ok(&["wait", "source"])? == "1", "/etc/passwd is there again");
    podman.ok(&["rm", "source"])?;
    podman.ok(&["rmi", "committed"]).map(drop)
}

/// With a pause meanwhile, after which the changes of a VM are on the host. Podman does not pause otherwise.
fn committed_while_it_runs(podman: &Podman) -> Result<()> {
    start(podman, "live", &[], "sleep 1000")?;
    podman.ok(&["exec", "live", "sh", "-c", "echo one > /one"])?;
    podman.ok(&["commit", "--pause", "live", "snapshot"])?;
    let output = podman.ok(&["run", "--rm", "--network", "none", "snapshot", "cat", "/one"])?;
    ensure!(output == "one", "{output}");
    podman.ok(&["exec", "live", "sh", "-c", "echo two > /two"])?;
    podman.ok(&["stop", "--time", "0", "live"])?;
    let changes = podman.ok(&["diff", "live"])?;
    ensure!(changes.contains("A /one") && changes.contains("A /two"), "{changes}");
    podman.ok(&["rm", "live"])?;
    podman.ok(&["rmi", "snapshot"]).map(drop)
}

/// The copy is there when the container starts again.
fn copied_after_its_end(podman: &Podman) -> Result<()> {
    let text = "echo from the container > /written; cat /given > /taken";
    podman.ok(&["create", "--name", "copied", "--network", "none", IMAGE, "sh", "-c", text])?;
    let file = |name: &str| podman.dir().join(name).display().to_string();
    fs::write(file("given"), "from the host\n")?;
    podman.ok(&["cp", &file("given"), "copied:/given"])?;
    podman.ok(&["start", "copied"])?;
    ensure!(podman.ok(&["wait", "copied"])? == "0");
    for (name, content) in [("written", "from the container\n"), ("taken", "from the host\n")] {
        podman.ok(&["cp", &format!("copied:/{name}"), &file(name)])?;
        ensure!(fs::read_to_string(file(name))? == content, "{name}");
    }
    podman.ok(&["rm", "copied"]).map(drop)
}

fn copied_while_it_runs(podman: &Podman) -> Result<()> {
    start(
        podman,
        "live",
        &[],
        "echo from the container > /written; echo x > /dev/shm/memory; exec sleep 1000",
    )?;
    let file = |name: &str| podman.dir().join(name).display().to_string();
    let wait = "until [ -e /dev/shm/memory ]; do sleep 0.1; done";
    podman.ok(&["exec", "live", "sh", "-c", wait])?;
    podman.ok(&["cp", "live:/written", &file("written")])?;
    ensure!(fs::read_to_string(file("written"))? == "from the container\n");
    fs::write(file("given"), "from the host\n")?;
    podman.ok(&["cp", &file("given"), "live:/given"])?;
    let seen = podman.ok(&["exec", "live", "cat", "/given"])?;
    ensure!(seen == "from the host", "{seen}");
    remove(podman, "live")
}

fn exported(podman: &Podman) -> Result<()> {
    podman.ok(&[
        "run",
        "--name",
        "source",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        "echo exported > /written",
    ])?;
    let archive = podman.dir().join("export.tar").display().to_string();
    podman.ok(&["export", "--output", &archive, "source"])?;
    for (name, content) in [("written", "exported\n"), ("etc/secret", "for root only\n")] {
        let file = Invocation::new("tar").args(["-xOf", &archive, name]).run()?.ok()?.text();
        ensure!(file == content, "{name}: {file}");
    }
    podman.ok(&["import", "--change", "CMD [\"cat\", \"/written\"]", &archive, "imported"])?;
    let output = podman.ok(&["run", "--rm", "--network", "none", "imported"])?;
    ensure!(output == "exported", "{output}");
    podman.ok(&["rm", "source"])?;
    podman.ok(&["rmi", "imported"]).map(drop)
}

/// Each step is a container of the runtime, without conmon.
fn a_build(podman: &Podman) -> Result<()> {
    let dir = podman.dir().join("context");
    fs::create_dir(&dir)?;
    fs::write(dir.join("given"), "given\n")?;
    let file = format!(
        "FROM {IMAGE}\nCOPY given /given\nRUN tr a-z A-Z < /given > /upper && echo built by $(id -u)\n\
         ENV NAME=value\nRUN test $NAME = value && ln -s upper /link\nUSER 1000\n\
         RUN --mount=type=tmpfs,target=/scratch test $(id -u) = 1000 && df /scratch | grep -q tmpfs\n\
         CMD [\"cat\", \"/link\"]\n"
    );
    fs::write(dir.join("Containerfile"), file)?;
    let options = ["build", "--network", "none", "--layers=false", "--force-rm"];
    let build = podman.podman(&options)?.args(["--tag", "built"]);
    let build = build.arg(&dir).deadline(Duration::from_secs(180)).run()?;
    let output = build.ok().context("podman build")?;
    ensure!(output.text().contains("built by 0"), "{output}");
    let output = podman.ok(&["run", "--rm", "--network", "none", "built"])?;
    ensure!(output == "GIVEN", "{output}");
    // A step that fails.
    fs::write(dir.join("Containerfile"), format!("FROM {IMAGE}\nRUN exit 7\n"))?;
    let output = podman.podman(&options)?.arg(&dir).run()?;
    ensure!(output.status == 7, "{output}");
    podman.ok(&["rmi", "built"])?;
    ensure!(script(podman, &[], "echo still")? == "still");
    Ok(fs::remove_dir_all(dir)?)
}
