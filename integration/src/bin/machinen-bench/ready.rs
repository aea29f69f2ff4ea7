//! Starts that use a clone which has waited for them (the warm pool).

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, process::DEADLINE, samples::Samples, setup::Value};
use serde_json::Value as Json;

use crate::{Kind, setup_of, start};

#[derive(Debug, Default)]
pub(crate) struct Ready {
    pub(crate) clone: Samples,
    /// Taken in turn with the clones.
    pub(crate) runc: Samples,
}

/// `ctr run --rm` of true, with one ready clone each time, and with runc.
pub(crate) fn measure(containerd: &Containerd, image: &str, cache: &Path, rounds: usize) -> Result<Ready> {
    let dir = containerd.root().join("pool");
    let setup = setup_of(containerd, Kind::Clone, cache);
    containerd.configure(&setup.set("pool", "size", Value::number(1)).set(
        "pool",
        "dir",
        Value::path(&dir),
    ))?;
    // Not counted: this start finds no clone, and requests one.
    run(containerd, image)?;
    let mut ready = Ready::default();
    for _ in 0..rounds {
        wait_for_one(containerd)?;
        wait_for_quiet(containerd)?;
        ready.runc.push(start::run(containerd, image, Kind::Runc)?);
        let from = containerd.log().position();
        ready.clone.push(run(containerd, image)?);
        let lines = containerd.log().since(from);
        ensure!(lines.iter().any(|line| line.contains("origin=ready")), "the VM was not a ready clone");
    }
    wait_for_one(containerd)?;
    containerd.machinen(&["pool", "drain"])?.run()?.ok()?;
    Ok(ready)
}

fn run(containerd: &Containerd, image: &str) -> Result<Duration> {
    let output = containerd.run(image, &["true"]).output()?;
    ensure!(output.status == 0, "{output}");
    Ok(output.duration)
}

/// Waits until what the last start has left to be done is done: the inventory stays as it is.
fn wait_for_quiet(containerd: &Containerd) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let before = containerd.inventory()?;
        #[expect(clippy::disallowed_methods, reason = "between measurements")]
        std::thread::sleep(Duration::from_millis(300));
        if containerd.inventory()? == before {
            return Ok(());
        }
        ensure!(Instant::now() < end, "a start is never done");
    }
}

fn wait_for_one(containerd: &Containerd) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let listed = containerd.machinen(&["pool", "ls", "--json"])?.run()?.ok()?;
        let members: Json = serde_json::from_slice(&listed.stdout).context("odd list")?;
        // Those that are being made are listed, too.
        let is_ready = |member: &Json| member["state"] == "ready";
        if members.as_array().is_some_and(|members| members.iter().any(is_ready)) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "no clone gets ready");
        #[expect(clippy::disallowed_methods, reason = "between measurements")]
        std::thread::sleep(Duration::from_millis(100));
    }
}
