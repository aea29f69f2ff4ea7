//! `checkpoint.verify`: a checkpoint is accepted when it has been restored.

use std::fs;

use anyhow::{Result, ensure};
use containerd_shim_protos::{
    api::{Empty, Status},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
    setup::{Setup, Value},
};
use serde_json::json;
use ttrpc::Code;

use super::{COUNTER, checkpoint, counts_from, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(restored_before_it_is_accepted);

fn restored_before_it_is_accepted(containerd: &mut Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("checkpoint", "verify", Value::text("restore")))?;
    let bundle = Bundle::busybox(containerd)?;
    // A file on the container's disk whose name was removed, and one that still has its name: a restore needs
    // the disk's state at the checkpoint.
    let script = format!("echo a >/kept; exec 4<>/kept; echo b >/gone; exec 5<>/gone; rm /gone; {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/etc/hosts", "bind", "/etc/hosts", &["rbind", "ro"]));
    })?;
    let served = Served::run(containerd, &config)?;
    let continues = |from: u32| {
        let status = served.exec_to("look", &["sh", "-c", &counts_from(from)], "")?;
        ensure!(status == 0, "the counter does not continue: {status}");
        served.is("", Status::RUNNING, served.pid)
    };
    continues(100)?;
    let machines = || -> Result<usize> {
        let inventory = containerd.inventory()?;
        Ok(inventory.processes.iter().filter(|process| process.command.contains("microvm")).count())
    };
    let before = machines()?;
    let dir = containerd.root().join("images");
    checkpoint(&served, &dir)?;
    let log = served.shim.log()?;
    ensure!(log.contains("verify="), "the checkpoint was not tried: {log}");
    ensure!(machines()? == before, "a VM is left");
    continues(103)?;
    fs::remove_dir_all(&dir)?;
    // A restore uses the bundle's configuration, in which the mounted file is now missing.
    let path = served.shim.bundle.join("config.json");
    let original = fs::read(&path)?;
    let mut changed: serde_json::Value = serde_json::from_slice(&original)?;
    changed["mounts"]
        .as_array_mut()
        .expect("an array")
        .retain(|mount| mount["destination"] != json!("/etc/hosts"));
    fs::write(&path, changed.to_string())?;
    let also = containerd.root().join("also");
    for exit in [false, true] {
        let options =
            CheckpointOptions { exit, image_path: also.display().to_string(), ..Default::default() };
        let (code, message) = refused(&served.client, &request(&served, &dir, Some(&options))?)?;
        ensure!(code == Code::FAILED_PRECONDITION, "{code:?}: {message}");
        for words in ["was removed, since its trial restore failed", "a file mounted at /etc/hosts"] {
            ensure!(message.contains(words), "{words:?} is not in {message}");
        }
        ensure!(!dir.exists() && !also.exists(), "something is left of a checkpoint that failed");
        ensure!(machines()? == before, "a VM is left");
        continues(104)?;
    }
    // The original configuration, and the end of the container after the checkpoint.
    fs::write(&path, original)?;
    let options = CheckpointOptions { exit: true, ..Default::default() };
    served.client.ok::<Empty>("Checkpoint", &request(&served, &dir, Some(&options))?)?;
    ensure!(served.wait("")?.exit_status == 137, "the container has not ended");
    // The container's own VM ends with it, and Delete waits for that.
    served.end_stopped()?;
    ensure!(machines()? < before, "a VM is left after the end");
    Ok(fs::remove_dir_all(&dir)?)
}
