//! When the server of a pod's volumes starts and ends, and what is left after a failure.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle, containerd::Containerd, inventory, process::Invocation, served::Served,
};
use serde_json::json;

use super::{bind, served, shell, source};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    without_volumes_there_is_no_server,
    a_failed_creation_leaves_nothing,
    a_lost_server_is_an_error_and_not_a_hang,
    a_killed_shim_leaves_no_server,
);

/// The pids of share servers.
pub(super) fn servers(containerd: &Containerd) -> Result<Vec<u32>> {
    let all = inventory::descendants(containerd.keeper_pid())?;
    Ok(all
        .iter()
        .filter(|process| process.command.contains("share-server"))
        .map(|process| process.pid)
        .collect())
}

pub(super) fn kill(pid: u32) -> Result<()> {
    Invocation::new("kill").args(["-KILL", &pid.to_string()]).run()?.ok().map(drop)
}

fn without_volumes_there_is_no_server(containerd: &mut Containerd) -> Result<()> {
    let plain = Served::idle(containerd)?;
    ensure!(servers(containerd)?.is_empty(), "a container without a volume has a server");
    plain.end()?;
    let data = source(containerd)?;
    let first = served(containerd, &data)?;
    ensure!(servers(containerd)?.len() == 1, "not one server: {:?}", servers(containerd)?);
    first.client.ok::<containerd_shim_protos::api::Empty>("Kill", &first.kill("", 9))?;
    first.wait("")?;
    first.client.ok::<containerd_shim_protos::api::DeleteResponse>("Delete", &first.delete(""))?;
    ensure!(servers(containerd)?.is_empty(), "the server outlives its VM");
    first.shim.shut_down(&first.client)
}

fn a_failed_creation_leaves_nothing(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["/no/such/program"], |spec| {
        bind(spec, &data, "/data", &[]);
        spec["linux"]["sysctl"] = json!({"kernel.no_such": "1"});
    })?;
    let before = containerd.inventory()?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.status != 0, "{output}");
    containerd.settle(&before)?;
    // Not even a file system that is mounted below the volume's source is in use.
    fs::remove_dir(&data)?;
    Ok(())
}

fn a_lost_server_is_an_error_and_not_a_hang(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    fs::write(data.join("f"), "")?;
    let served = served(containerd, &data)?;
    shell(&served, "ls /data")?;
    kill(*servers(containerd)?.first().context("no server")?)?;
    let (status, text) = served.shell("sleep 1.2; cat /data/f 2>&1")?;
    ensure!(status != 0, "a volume without a server was read: {text}");
    ensure!(shell(&served, "echo well")? == "well\n", "the container is not usable");
    served.end()
}

fn a_killed_shim_leaves_no_server(containerd: &mut Containerd) -> Result<()> {
    let data = source(containerd)?;
    let config =
        Bundle::busybox(containerd)?.config(&["sleep", "1000"], |spec| bind(spec, &data, "/data", &[]))?;
    let before = containerd.inventory()?;
    let run = containerd.run_spec(&config).detached().flag("--null-io");
    run.ok()?;
    let server = *servers(containerd)?.first().context("no server")?;
    let shim = inventory::descendants(containerd.keeper_pid())?;
    let shim = shim.iter().find(|process| process.pid == server).context("no server")?.parent;
    let from = containerd.log().position();
    kill(shim)?;
    ensure!(
        machinen_integration::process::wait_for_end(server, std::time::Duration::from_secs(10))?,
        "the server stays"
    );
    let id = run.container();
    containerd.log().wait_for(from, |line| line.contains("shim disconnected") && line.contains(id))?;
    containerd.ctr_output(&["tasks", "delete", "--force", id])?;
    containerd.ctr_ok(&["containers", "delete", id])?;
    containerd.settle(&before)
}
