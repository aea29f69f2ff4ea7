//! Checkpoints: in the place of the container, as an archive, and of a container that continues.

use anyhow::{Result, ensure};
use machinen_integration::podman::{Podman, PodmanCommands as _};

use super::{inspect, remove, start, with_podman};

with_podman!(in_place, exported, left_running, before_the_checkpoint);

/// Counts in memory, and writes each number to a file.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done";

/// Waits until the counter has exceeded a number, and returns the counter.
fn count(podman: &Podman, name: &str, above: u32) -> Result<u32> {
    let script = format!(
        "until n=$(cat /count) && [ ${{n:-0}} -gt {above} ]; do sleep 0.1; done 2> /dev/null; echo $n"
    );
    Ok(podman.ok(&["exec", name, "sh", "-c", &script])?.parse()?)
}

fn in_place(podman: &Podman) -> Result<()> {
    start(podman, "counter", &[], COUNTER)?;
    let seen = count(podman, "counter", 3)?;
    podman.ok(&["container", "checkpoint", "--keep", "counter"])?;
    let state = inspect(podman, "{{.State.Status}} {{.State.Checkpointed}}", "counter")?;
    ensure!(state == "exited true", "{state}");
    podman.ok(&["container", "restore", "--keep", "counter"])?;
    // A counter that had begun again would be lower.
    let now = count(podman, "counter", seen)?;
    ensure!(now < seen + 100, "{seen} before, {now} after");
    ensure!(inspect(podman, "{{.State.Status}}", "counter")? == "running");
    remove(podman, "counter")
}

/// The archive has the files too.
fn exported(podman: &Podman) -> Result<()> {
    start(podman, "counter", &[], COUNTER)?;
    podman.ok(&["exec", "counter", "sh", "-c", "echo kept > /kept"])?;
    let seen = count(podman, "counter", 3)?;
    let archive = podman.dir().join("counter.tar.gz").display().to_string();
    podman.ok(&["container", "checkpoint", "--export", &archive, "counter"])?;
    remove(podman, "counter")?;
    for name in ["one", "two"] {
        podman.ok(&["container", "restore", "--import", &archive, "--name", name])?;
        count(podman, name, seen)?;
        let kept = podman.ok(&["exec", name, "cat", "/kept"])?;
        ensure!(kept == "kept", "{kept}");
    }
    remove(podman, "one")?;
    remove(podman, "two")
}

fn left_running(podman: &Podman) -> Result<()> {
    start(podman, "counter", &[], COUNTER)?;
    count(podman, "counter", 3)?;
    let archive = podman.dir().join("counter.tar.gz").display().to_string();
    podman.ok(&["container", "checkpoint", "--leave-running", "--export", &archive, "counter"])?;
    ensure!(inspect(podman, "{{.State.Status}}", "counter")? == "running");
    let seen = count(podman, "counter", 0)?;
    count(podman, "counter", seen)?;
    podman.ok(&["container", "restore", "--import", &archive, "--name", "copy", "--ignore-static-ip"])?;
    count(podman, "copy", 3)?;
    remove(podman, "copy")?;
    remove(podman, "counter")
}

/// A first dump of the memory while the container runs makes the second one small. It needs features of the kernel: without
/// them it is refused, and the container continues.
fn before_the_checkpoint(podman: &Podman) -> Result<()> {
    start(podman, "counter", &[], COUNTER)?;
    let seen = count(podman, "counter", 3)?;
    let first = podman.output(&["container", "checkpoint", "--pre-checkpoint", "counter"])?;
    ensure!(inspect(podman, "{{.State.Status}}", "counter")? == "running");
    if first.status != 0 {
        let named = ["missing features", "pre-dump"].iter().any(|text| first.error_text().contains(text));
        ensure!(named, "{first}");
        eprintln!("not tested, because it was refused: {first}");
        return remove(podman, "counter");
    }
    podman.ok(&["container", "checkpoint", "--with-previous", "counter"])?;
    podman.ok(&["container", "restore", "counter"])?;
    count(podman, "counter", seen)?;
    remove(podman, "counter")
}
