//! Forks of containers with volumes, and their checkpoints by `ctr`.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use machinen_integration::containerd::Containerd;

use super::{count_above, end_all, fork, forking, nothing_of, sh};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(
    writable_volumes_are_shared_on_request_only,
    read_only_volumes_are_shared,
    restored_by_ctr
);

/// Counts, and writes once to the file of the volume that has its hostname. A file that is open there at the moment of
/// the checkpoint must still have its name when the fork is restored.
const COUNTER: &str = "mkdir /data; i=100; while :; do i=$((i+1)); f=/volume/$(hostname); \
                       [ -e $f ] || { echo $i >$f.new; mv $f.new $f; }; echo $i >/data/count; usleep 50000; done";

fn volume(containerd: &Containerd, options: &str) -> Result<(PathBuf, String)> {
    let dir = containerd.root().join(format!("volume-{}", containerd.new_id()));
    fs::create_dir(&dir)?;
    let flag = format!("type=bind,src={},dst=/volume,options={options}", dir.display());
    Ok((dir, flag))
}

fn writable_volumes_are_shared_on_request_only(containerd: &mut Containerd) -> Result<()> {
    let (dir, flag) = volume(containerd, "rbind:rw")?;
    let run = containerd.run(IMAGE, &["sh", "-c", COUNTER]).detached().flags(&[
        "--null-io",
        "--mount",
        &flag,
        "--hostname",
        "source",
    ]);
    run.ok()?;
    let (source, new) = (run.container(), containerd.new_id());
    let before = count_above(containerd, source, 102)?;
    let refused = forking(containerd, &[source, &new])?.run()?;
    let printed = refused.error_text();
    for words in ["has writable volumes", "/volume from ", &dir.display().to_string(), "--volumes share"] {
        ensure!(refused.status != 0 && printed.contains(words), "{words:?} is not in {printed}");
    }
    nothing_of(containerd, &new)?;
    count_above(containerd, source, before)?;
    fork(containerd, &["--volumes", "share", "--hostname", "fork", source, &new])?;
    let forked = count_above(containerd, &new, before)?;
    count_above(containerd, source, forked)?;
    // Both write to the same directory, and each sees the other's file.
    sh(containerd, source, "until [ -s /volume/fork ]; do usleep 50000; done")?;
    sh(containerd, &new, "[ -s /volume/source ]")?;
    ensure!(dir.join("fork").is_file() && dir.join("source").is_file(), "a file is missing on the host");
    end_all(containerd, [source, &new])
}

fn read_only_volumes_are_shared(containerd: &mut Containerd) -> Result<()> {
    let (dir, flag) = volume(containerd, "rbind:ro")?;
    fs::write(dir.join("f"), "one\ntwo\n")?;
    let script = "exec 3</volume/f; read -r a <&3; mkdir /data; touch /data/ready; until [ -e /data/go ]; do usleep 50000; done; \
                  read -r b <&3; echo $a $b >/data/new; mv /data/new /data/read; exec sleep 1000";
    let run = containerd.run(IMAGE, &["sh", "-c", script]).detached().flags(&["--null-io", "--mount", &flag]);
    run.ok()?;
    let (source, new) = (run.container(), containerd.new_id());
    sh(containerd, source, "until [ -e /data/ready ]; do usleep 50000; done")?;
    fork(containerd, &[source, &new])?;
    for id in [source, &new] {
        let read = sh(
            containerd,
            id,
            "touch /data/go; until [ -e /data/read ]; do usleep 50000; done; cat /data/read",
        )?;
        ensure!(read == "one two", "{id} has read {read:?}");
        let refused = sh(containerd, id, "touch /volume/x 2>/dev/null || echo refused")?;
        ensure!(refused == "refused", "{id} writes to a read-only volume");
    }
    end_all(containerd, [source, &new])
}

/// A checkpoint in an image has the container's configuration, and with it its volumes.
fn restored_by_ctr(containerd: &mut Containerd) -> Result<()> {
    const REF: &str = "machinen.test/volumes:1";
    let (dir, flag) = volume(containerd, "rbind:rw")?;
    let run = containerd.run(IMAGE, &["sh", "-c", COUNTER]).detached().flags(&[
        "--null-io",
        "--mount",
        &flag,
        "--hostname",
        "source",
    ]);
    run.ok()?;
    let (source, new) = (run.container(), containerd.new_id());
    let before = count_above(containerd, source, 102)?;
    containerd.ctr_ok(&["containers", "checkpoint", "--rw", "--image", "--task", source, REF])?;
    containerd.end(source)?;
    fs::remove_file(dir.join("source"))?;
    containerd.ctr_ok(&["containers", "restore", "--rw", "--live", &new, REF])?;
    count_above(containerd, &new, before)?;
    ensure!(dir.join("source").is_file(), "the restored container does not write to the volume");
    containerd.end(&new)?;
    crate::checkpoint::remove_what_containerd_leaves(containerd)?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF]).map(drop)
}
