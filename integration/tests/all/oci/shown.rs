//! What the runtime shows: containers, processes, counts, itself.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    oci::{Oci, json_of},
    runtime::Runtime,
};
use serde_json::Value;

use super::{SLEEP, with_oci};

with_oci!(lists, processes, counts, itself, a_new_specification);

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))
}

fn lists(oci: &Oci) -> Result<()> {
    fs::create_dir_all(oci.host().root().join("state"))?;
    let empty = oci.ok(&["list"])?;
    ensure!(empty.split_whitespace().eq(["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]), "{empty}");
    ensure!(["null", "[]"].contains(&oci.ok(&["list", "--format", "json"])?.trim()));
    let bundle = oci.bundle("one", &SLEEP, |spec| spec["annotations"] = serde_json::json!({ "a": "b" }))?;
    let _container = oci.create("one")?;
    let list = oci.ok(&["list"])?;
    let line: Vec<_> = list.lines().nth(1).context("no line")?.split_whitespace().collect();
    let (pid, dir) = (oci.pid("one")?.to_string(), bundle.dir().display().to_string());
    ensure!(line[..4] == ["one", &pid, "created", &dir] && line[5] == "root", "{list}");
    ensure!(oci.ok(&["list", "--quiet"])? == "one\n");
    let text = oci.ok(&["list", "--format", "json"])?;
    let keys = ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"];
    let places: Vec<_> = keys.iter().map(|key| text.find(&format!("\"{key}\":"))).collect();
    ensure!(places.iter().all(Option::is_some) && places.is_sorted(), "{text}");
    let list = json(&oci.ok(&["list", "--format", "json"])?)?;
    let first = &list[0];
    ensure!(first["id"] == "one" && first["status"] == "created" && first["bundle"] == dir, "{list}");
    ensure!(first["annotations"]["a"] == "b" && first["pid"].as_u64() == pid.parse().ok(), "{list}");
    ensure!(first["created"].as_str().is_some_and(|time| time.contains('T')), "{list}");
    let output = oci.output(&["list", "--format", "xml"])?;
    ensure!(output.status != 0 && output.error_text().contains("format"), "{output}");
    oci.ok(&["delete", "--force", "one"]).map(drop)
}

/// A directory that the caller names must exist, as with runc since 1.5.
#[test]
fn no_root() {
    super::run(Runtime::Machinen, |oci| {
        let output = oci.scripted("exec \"$1\" --root /no/such/directory list", &["list"])?.run()?;
        ensure!(output.status == 1 && output.error_text().contains("/no/such/directory"), "{output}");
        Ok(())
    });
}

fn processes(oci: &Oci) -> Result<()> {
    oci.bundle("p", &["sh", "-c", "sleep 1234 & echo ready; wait"], |_| {})?;
    let container = oci.launch("p")?;
    container.wait_for_stdout("ready\n")?;
    let table = oci.ok(&["ps", "p"])?;
    ensure!(table.lines().next().is_some_and(|line| line.contains("PID")), "{table}");
    let pids = json(&oci.ok(&["ps", "--format", "json", "p"])?)?;
    let pids: Vec<u64> = serde_json::from_value(pids)?;
    ensure!(table.contains("sleep 1234"), "{table}");
    ensure!(pids.len() == 2 && table.lines().count() == 3, "{table} {pids:?}");
    // As the container sees them, if it has a kernel of its own.
    ensure!(!oci.runtime().has_vm() || pids[0] == 1, "{pids:?}");
    oci.ok(&["delete", "--force", "p"]).map(drop)
}

fn counts(oci: &Oci) -> Result<()> {
    oci.bundle("c", &["sh", "-c", "sleep 1234 & echo ready; wait"], |_| {})?;
    let container = oci.launch("c")?;
    container.wait_for_stdout("ready\n")?;
    let event = oci.ok(&["events", "--stats", "c"])?;
    ensure!(event.starts_with(r#"{"type":"stats","id":"c","data":{"#), "{event}");
    let event = json(&event)?;
    ensure!(event["type"] == "stats" && event["id"] == "c", "{event}");
    let data = &event["data"];
    ensure!(data["pids"]["current"] == 2, "{data}");
    for pointer in ["/cpu/usage/total", "/cpu/usage/user", "/cpu/usage/kernel", "/memory/usage/usage"] {
        ensure!(data.pointer(pointer).is_some_and(Value::is_u64), "no {pointer} in {data}");
    }
    ensure!(data["memory"]["raw"].is_object() && data["cpu"]["throttling"].is_object(), "{data}");
    // The first event in an interval, as a line.
    let running = oci.command(&["events", "--interval", "1s", "c"])?.spawn()?;
    running.wait_for_stdout("\"type\":\"stats\"")?;
    oci.ok(&["delete", "--force", "c"]).map(drop)
}

fn itself(oci: &Oci) -> Result<()> {
    let features = json(&oci.ok(&["features"])?)?;
    for pointer in [
        "/ociVersionMin",
        "/ociVersionMax",
        "/hooks",
        "/mountOptions",
        "/linux/namespaces",
        "/linux/capabilities",
    ] {
        ensure!(features.pointer(pointer).is_some(), "no {pointer} in {features}");
    }
    let hooks = features["hooks"].as_array().context("no list")?;
    ensure!(hooks.len() == 6, "{features}");
    let version = oci.ok(&["--version"])?;
    let name = oci.runtime().name();
    ensure!(version.starts_with(&format!("{name} version ")) && version.contains("\nspec: "), "{version}");
    Ok(())
}

/// It can be run as it is, but for the terminal and the root file system.
fn a_new_specification(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("n", &["true"], |_| {})?;
    let (dir, file) = (bundle.dir().display().to_string(), bundle.dir().join("config.json"));
    oci.fails(&["spec", "--bundle", &dir], 1, "exists")?;
    fs::remove_file(&file)?;
    oci.ok(&["spec", "--bundle", &dir])?;
    let mut spec = json_of(&file)?;
    ensure!(spec["process"]["terminal"] == true && spec["root"]["path"] == "rootfs", "{spec}");
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["echo", "as it is"]);
    spec["linux"]["cgroupsPath"] = format!("/{}/n", oci.host().name()).into();
    bundle.config_text(&spec.to_string())?;
    let output = oci.ok(&["run", "--bundle", &dir, "n"])?;
    ensure!(output == "as it is\n", "{output}");
    Ok(())
}
