//! Monitors that have waited in the warm pool, with a VM that is ready.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    oci::Oci,
    process::{DEADLINE, wait_for_end},
    runtime::Runtime,
    setup::{Setup, Value},
    templates::Watch,
};
use serde_json::Value as Json;

/// The second container gets the VM that was made ready after the first one's start. A VM that no container gets
/// ends after some time.
#[test]
fn a_ready_vm_is_used_or_ends() {
    let setup = Setup::new().set("pool", "size", Value::number(1)).set(
        "pool",
        "containerd_timeout_s",
        Value::number(5),
    );
    let oci = Oci::start_with(Runtime::Machinen, &setup).unwrap_or_else(|error| panic!("{error:#}"));
    super::attempt(&oci, used_or_ended).unwrap_or_else(|error| panic!("{error:#}"));
}

fn used_or_ended(oci: &Oci) -> Result<()> {
    oci.bundle("c", &["echo", "well"], |_| {})?;
    ensure!(origin(oci)? == "clone", "nothing can be ready yet");
    let member = ready(oci)?;
    ensure!(origin(oci)? == "ready", "the VM that waits was not used");
    ensure!(wait_for_end(member, DEADLINE)?, "the monitor {member} stays after its container");
    let member = ready(oci)?;
    ensure!(wait_for_end(member, DEADLINE)?, "the unused VM of {member} stays");
    // The files of slots stay for the next members.
    Ok(fs::remove_dir_all(oci.host().path("/run/machinen/pool"))?)
}

/// Runs the container, and returns where its VM comes from.
fn origin(oci: &Oci) -> Result<String> {
    let (bundle, log) = (oci.bundle_dir("c"), oci.file("log"));
    let run = oci.command_with(&["--debug", "--log", &log.display().to_string()], &["run", "--bundle"])?;
    let printed = run.arg(bundle).arg("c").run()?.ok()?.text();
    ensure!(printed == "well\n", "{printed}");
    let text = fs::read_to_string(&log)?;
    fs::remove_file(&log)?;
    let origin = text.split("origin=").nth(1).and_then(|rest| rest.split([' ', '"', '\n']).next());
    Ok(origin.with_context(|| format!("no origin in {text}"))?.to_owned())
}

/// Waits until a VM is ready, and returns the pid of its owner.
fn ready(oci: &Oci) -> Result<u32> {
    let mut found = None;
    // Each host has a /run of its own.
    let dir = oci.host().path("/run/machinen/pool");
    let pool = fs::read_dir(&dir)?.next().context("no pool")??.path();
    Watch::of(&pool)?.wait_until(|| {
        let members: Json = serde_json::from_str(&oci.ok(&["pool", "ls", "--json"])?)?;
        let ready = members.as_array().context("no list")?.iter().find(|member| member["state"] == "ready");
        found = ready.and_then(|member| member["pid"].as_u64());
        Ok(found.is_some())
    })?;
    Ok(u32::try_from(found.context("no pid")?)?)
}
