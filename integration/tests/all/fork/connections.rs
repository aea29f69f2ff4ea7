//! Established TCP connections in a fork and in a restore.

use anyhow::{Result, ensure};
use containerd_shim_protos::{api::Empty, shim::oci::CheckpointOptions};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use serde_json::json;

use super::{end_all, fork, sh};
use crate::{
    checkpoint::request,
    harness::{IMAGE, on_newest_containerd},
};

on_newest_containerd!(closed_in_a_fork_unless_asked_for, closed_in_a_restore_if_asked_for);

/// Both ends of a connection; writes down what comes back through it, or why nothing does.
const TALKING: &str = "trap '' PIPE; cd /dev/shm; (nc -l -p 7000 -e cat) & sleep 1; mkfifo in; \
                       (nc 127.0.0.1 7000 <in >out; echo $? >ended) & exec 3>in; \
                       n=0; while :; do n=$((n+1)); echo $n >&3; sleep 1; done";
/// The number of established ends, in either protocol that the listener may have used.
const ESTABLISHED: &str = "cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 01 '";
const CONNECTED: &str = "until [ $(cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 01 ') = 2 ] && [ -s /dev/shm/out ]; do usleep 50000; done; true";
/// Waits until more comes back than before.
const CONTINUES: &str =
    "a=$(wc -l </dev/shm/out); until [ $(wc -l </dev/shm/out) -gt $a ]; do usleep 50000; done";

fn closed_in_a_fork_unless_asked_for(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sh", "-c", TALKING]).detached().flag("--null-io");
    run.ok()?;
    let (source, closed, kept) = (run.container(), containerd.new_id(), containerd.new_id());
    sh(containerd, source, CONNECTED)?;
    fork(containerd, &[source, &closed])?;
    ensure!(sh(containerd, &closed, &format!("{ESTABLISHED} || true"))? == "0", "connections are not closed");
    // The client is notified of the end.
    sh(containerd, &closed, "until [ -e /dev/shm/ended ]; do usleep 50000; done")?;
    // The source's own connection is unchanged, and may be kept.
    sh(containerd, source, CONTINUES)?;
    fork(containerd, &["--tcp", "keep", source, &kept])?;
    for id in [source, &kept] {
        sh(containerd, id, CONTINUES)?;
        ensure!(sh(containerd, id, ESTABLISHED)? == "2", "{id} is not connected");
    }
    end_all(containerd, [source, &closed, &kept])
}

/// The same by the annotation, for clients that restore without `machinen fork`.
fn closed_in_a_restore_if_asked_for(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = |tcp: &str| {
        bundle.config(&["sh", "-c", TALKING], |spec| spec["annotations"] = json!({"io.machinen.tcp": tcp}))
    };
    let source = Served::run(containerd, &config("keep")?)?;
    ensure!(source.exec_to("connected", &["sh", "-c", CONNECTED], "")? == 0, "no connection");
    let dir = containerd.root().join("images");
    let open = CheckpointOptions { open_tcp: true, ..Default::default() };
    source.client.ok::<Empty>("Checkpoint", &request(&source, &dir, Some(&open))?)?;
    source.end()?;
    for (tcp, established) in [("keep", "2"), ("close", "0")] {
        let restored = Served::restored(containerd, &config(tcp)?, &dir)?;
        let look = format!("[ $({ESTABLISHED}) = {established} ]");
        ensure!(restored.exec_to("look", &["sh", "-c", &look], "")? == 0, "{tcp}: not {established} ends");
        restored.end()?;
    }
    Ok(std::fs::remove_dir_all(&dir)?)
}
