//! `ctr` checkpoints a container that runs in a microVM, and restores it in another.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, paths::Version, process::DEADLINE};

use crate::harness::{IMAGE, on_every_containerd};

on_every_containerd!(a_container_moves_in_an_image);

pub(super) const REF: &str = "machinen.test/checkpoint:1";

/// Counts in memory and shows the count in a file, below a directory that a restore without writes would
/// lack.
const COUNTER: &str = "mkdir /data; exec 4<>/data/gone; echo kept >&4; rm /data/gone; exec 5>>/data/log; i=100; while :; do i=$((i+1)); echo $i >/data/new; echo $i >&5; mv /data/new /data/count; \
                       usleep 50000; done";

fn a_container_moves_in_an_image(containerd: &mut Containerd) -> Result<()> {
    let first = containerd.run(IMAGE, &["sh", "-c", COUNTER]).detached().flag("--null-io");
    first.ok()?;
    let id = first.container().to_owned();
    let before = count_above(containerd, &id, 103)?;
    containerd.ctr_ok(&["containers", "checkpoint", "--rw", "--image", "--task", &id, REF])?;
    // The source continues to run.
    count_above(containerd, &id, before)?;
    containerd.end(&id)?;
    // The checkpoint is exported to another host and imported again.
    let archive = containerd.root().join("checkpoint.tar");
    let mut export = containerd.ctr(["images", "export", "--skip-manifest-json"])?;
    if containerd.version() != Version::V1_6 {
        // Without it, ctr ends as soon as containerd has sent the archive, and may leave its last part unwritten.
        export = export.arg("--local");
    }
    export.arg(&archive).arg(REF).run()?.ok()?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF])?;
    containerd.ctr(["images", "import", "--no-unpack"])?.arg(&archive).run()?.ok()?;
    fs::remove_file(&archive)?;
    let second = containerd.new_id();
    containerd.ctr_ok(&["containers", "restore", "--rw", "--live", &second, REF])?;
    let restored = count(containerd, &second)?;
    ensure!(restored >= before, "the count has begun anew: {before} before, {restored} after");
    count_above(containerd, &second, restored)?;
    // An open file whose name was removed before the checkpoint, and one that is still being written.
    let look =
        "grep -qx kept /proc/1/fd/4 && grep -qx 101 /data/log && grep -qx $(cat /data/count) /data/log";
    let exec = containerd.new_id();
    containerd.ctr_ok(&["tasks", "exec", "--exec-id", &exec, &second, "sh", "-c", look])?;
    // The restored container is removed like any other.
    containerd.ctr_ok(&["tasks", "pause", &second])?;
    containerd.ctr_ok(&["tasks", "resume", &second])?;
    containerd.ctr_ok(&[
        "containers",
        "checkpoint",
        "--rw",
        "--image",
        "--task",
        &second,
        "machinen.test/checkpoint:2",
    ])?;
    let paused = count(containerd, &second)?;
    count_above(containerd, &second, paused)?;
    containerd.end(&second)?;
    remove_what_containerd_leaves(containerd)?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF, "machinen.test/checkpoint:2"])?;
    Ok(())
}

/// The current count.
fn count(containerd: &Containerd, id: &str) -> Result<u32> {
    let exec = containerd.new_id();
    let text = containerd.ctr_ok(&["tasks", "exec", "--exec-id", &exec, id, "cat", "/data/count"])?;
    text.trim().parse().with_context(|| format!("odd count {text:?}"))
}

fn count_above(containerd: &Containerd, id: &str, least: u32) -> Result<u32> {
    let end = std::time::Instant::now() + DEADLINE;
    loop {
        let count = count(containerd, id).unwrap_or(0);
        if count > least {
            return Ok(count);
        }
        ensure!(std::time::Instant::now() < end, "the counter stands at {count}");
        #[expect(clippy::disallowed_methods, reason = "a change of a container's file has no event")]
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// containerd unpacks a checkpoint for the runtime, and never removes it.
pub(crate) fn remove_what_containerd_leaves(containerd: &Containerd) -> Result<()> {
    for entry in fs::read_dir(containerd.root().join("tmp"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ctrd-checkpoint") {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
