//! What is seen of a container: `ls`, `top` and `console`.

use anyhow::{Context, Result, ensure};
use machinen_integration::oci::Oci;
use serde_json::Value;

use super::{background, json, on_a_host};

on_a_host!(listed, processes, console);

/// The container in `machinen ls`; other tests' containers are listed, too.
pub(super) fn row(text: &str, id: &str) -> Result<Value> {
    let all = json(text)?;
    let all = all.as_array().context("no list")?;
    all.iter().find(|row| row["id"] == id).cloned().with_context(|| format!("no {id} in {text}"))
}

fn listed(oci: &Oci) -> Result<()> {
    background(oci, "ls-one", &["--memory", "256m"], ":")?;
    oci.bundle("ls-two", &["true"], |_| {})?;
    let _two = oci.launch("ls-two")?;
    let one = row(&oci.ok(&["ls", "--format", "json"])?, "ls-one")?;
    ensure!(one["owner"] == "machinen" && one["status"] == "running", "{one}");
    ensure!(one["image"].as_str().is_some_and(|image| !image.is_empty()), "{one}");
    let vm = &one["vm"];
    ensure!(vm["memoryCeiling"].as_u64().is_some_and(|bytes| bytes >= 256 << 20), "{one}");
    ensure!(
        vm["pss"].as_u64().zip(vm["rss"].as_u64()).is_some_and(|(pss, rss)| pss > 0 && rss >= pss),
        "{one}"
    );
    ensure!(one["uptimeSeconds"].is_u64(), "{one}");
    let table = oci.ok(&["ls"])?;
    let line = table.lines().find(|line| line.starts_with("ls-one ")).context("not in the table")?;
    ensure!(line.contains("running") && line.contains("MiB / "), "{table}");
    ensure!(oci.ok(&["ls", "-q"])?.lines().any(|id| id == "ls-one"));
    oci.ok(&["pause", "ls-one"])?;
    ensure!(row(&oci.ok(&["ls", "--format", "json", "--running"])?, "ls-one")?["status"] == "paused");
    // A monitor that was killed leaves a container that has stopped.
    let monitor = vm["pid"].as_u64().context("no VM")?;
    ensure!(std::fs::exists(format!("/proc/{monitor}"))?);
    oci.ok(&["delete", "--force", "ls-one"])?;
    oci.ok(&["delete", "--force", "ls-two"])?;
    ensure!(row(&oci.ok(&["ls", "--format", "json"])?, "ls-one").is_err());
    Ok(())
}

fn processes(oci: &Oci) -> Result<()> {
    background(
        oci,
        "top",
        &[],
        "sleep 4321 & printf '#!/bin/sh\\nsleep 77\\n' > /odd; chmod +x /odd; /odd \"$(printf 'a\\033[2Jb')\" & true",
    )?;
    let table = oci.ok(&["top", "top"])?;
    ensure!(table.lines().next().is_some_and(|head| head.contains("COMMAND")), "{table}");
    ensure!(table.contains("sleep 4321") && !table.contains('\u{1b}'), "{table}");
    let all = json(&oci.ok(&["top", "--format", "json", "top"])?)?;
    let all = all.as_array().context("no list")?;
    let first = &all[0];
    ensure!(first["pid"] == 1 && first["parentPid"] == 0 && first["uid"] == 0, "{first}");
    ensure!(first["rss"].as_u64().is_some_and(|bytes| bytes > 0), "{first}");
    let sleep = all.iter().find(|process| process["command"] == "sleep 4321").context("no sleep")?;
    ensure!(sleep["parentPid"] == 1 && sleep["state"] == "S", "{sleep}");
    oci.ok(&["pause", "top"])?;
    ensure!(oci.ok(&["top", "top"])?.contains("sleep 4321"));
    oci.ok(&["delete", "--force", "top"])?;
    oci.fails(&["top", "top"], 1, "there is no container")
}

fn console(oci: &Oci) -> Result<()> {
    background(oci, "con", &[], "echo to-the-kernel > /dev/kmsg || true")?;
    oci.ok(&["console", "con"])?;
    // --follow ends with the VM.
    let mut following = oci.command(&["console", "--follow", "con"])?.spawn()?;
    oci.ok(&["delete", "--force", "con"])?;
    following.wait_for_exit()?;
    Ok(())
}
