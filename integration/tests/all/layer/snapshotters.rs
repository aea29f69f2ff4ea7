//! Snapshotters other than overlayfs: native, blockfile and erofs.

use std::{fs, os::unix::fs::MetadataExt};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, paths::Version, setup::Setup};

use super::Kept;
use crate::harness::{IMAGE, on_newest_containerd, run_with};

on_newest_containerd!(native_snapshotter, removed_after_a_pause);

fn native_snapshotter(containerd: &mut Containerd) -> Result<()> {
    let script = "echo run >> /count; cat /count; rm -f /etc/secret; rm -rf /home/alice; mkdir /home/alice; \
                  echo x > /home/alice/f; echo y >> /etc/passwd; wc -l < /etc/passwd";
    let kept = Kept::run(containerd, IMAGE, "native", script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let dir = kept.dir()?;
    ensure!(fs::read_to_string(dir.join("count"))? == "run\n", "not in the snapshot");
    ensure!(!dir.join("etc/secret").exists() && dir.join("bin/busybox").exists(), "odd tree");
    ensure!(fs::metadata(dir.join("bin/busybox"))?.nlink() == 1, "the old tree is still there");
    let diff = kept.diff()?;
    for path in ["count", "etc/.wh.secret", "home/alice/f", "etc/passwd"] {
        ensure!(diff.contains_key(path), "no {path} in the diff: {:?}", diff.keys());
    }
    ensure!(!diff.contains_key("bin/busybox"), "what was not touched is in the diff");
    let lines = fs::read_to_string(dir.join("etc/passwd"))?.lines().count();
    let seen = kept.again()?;
    ensure!(seen == format!("run\nrun\n{}\n", lines + 1), "the next start printed\n{seen}");
    let others: Vec<_> = fs::read_dir(dir.parent().context("no parent")?)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.contains("machinen"))
        .collect();
    ensure!(others.is_empty(), "left next to the snapshots: {others:?}");
    kept.remove()
}

/// The export at the pause has put the file into the snapshot, and the one at the end must not keep it.
fn removed_after_a_pause(containerd: &mut Containerd) -> Result<()> {
    for snapshotter in ["native", "overlayfs"] {
        let script = "echo x > /removed; echo x > /kept; until [ -e /go ]; do sleep 0.1; done; rm /removed";
        let kept = Kept::start(containerd, IMAGE, snapshotter, script)?;
        let exec = |script: &str| {
            containerd.ctr_ok(&["tasks", "exec", "--exec-id", "do", &kept.id, "sh", "-c", script])
        };
        exec("until [ -s /kept ]; do sleep 0.1; done")?;
        containerd.ctr_ok(&["tasks", "pause", &kept.id])?;
        ensure!(kept.dir()?.join("removed").exists(), "{snapshotter}: not exported at the pause");
        containerd.ctr_ok(&["tasks", "resume", &kept.id])?;
        let from = containerd.log().position();
        exec("touch /go")?;
        // The added process has an exit, too.
        let mut exits = 0;
        containerd.log().wait_for(from, |line| {
            exits += usize::from(line.contains("/tasks/exit"));
            exits == 2
        })?;
        ensure!(kept.delete_task()? == 0, "the script failed");
        let dir = kept.dir()?;
        let present = ["removed", "kept", "go"].map(|name| dir.join(name).exists());
        ensure!(present == [false, true, true], "{snapshotter}: removed, kept, go: {present:?}");
        kept.remove()?;
    }
    Ok(())
}

/// The writes of a container to a snapshot of that kind are in the snapshot, and visible at the next start.
fn is_kept_in(containerd: &Containerd, snapshotter: &'static str) -> Result<()> {
    let script = "echo run >> /count; cat /count; rm -f /etc/secret; mkdir -p /new; echo x > /new/f";
    let kept = Kept::run(containerd, IMAGE, snapshotter, script)?;
    ensure!(kept.delete_task()? == 0, "the script failed");
    let diff = kept.diff()?;
    for path in ["count", "etc/.wh.secret", "new/f"] {
        ensure!(diff.contains_key(path), "no {path} in the diff: {:?}", diff.keys());
    }
    ensure!(!diff.contains_key("bin/busybox"), "what was not touched is in the diff");
    let seen = kept.again()?;
    ensure!(seen == "run\nrun\n", "the next start printed\n{seen}");
    kept.delete_task()?;
    kept.remove()
}

/// Snapshots that are disks are attached to the guest unchanged.
fn blockfile_snapshotter(containerd: &mut Containerd) -> Result<()> {
    is_kept_in(containerd, "blockfile")?;

    // While the container is paused, other processes read a whole file system; the container can be killed
    // then.
    let script = "echo one > /paused; sleep 1000";
    let kept = Kept::start(containerd, IMAGE, "blockfile", script)?;
    let exec = |words: &[&str]| {
        containerd.ctr_ok(&[&["tasks", "exec", "--exec-id", "look", &kept.id], words].concat())
    };
    exec(&["sh", "-c", "until [ -s /paused ]; do :; done; echo two > /also"])?;
    containerd.ctr_ok(&["tasks", "pause", &kept.id])?;
    let diff = kept.diff()?;
    ensure!(diff.contains_key("paused") && diff.contains_key("also"), "not in the diff: {:?}", diff.keys());
    containerd.ctr_ok(&["tasks", "resume", &kept.id])?;
    exec(&["sh", "-c", "echo three > /third"])?;
    containerd.ctr_ok(&["tasks", "pause", &kept.id])?;
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &kept.id])?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    ensure!(kept.delete_task()? == 137, "not killed");
    ensure!(kept.diff()?.contains_key("third"), "the last write is not there");
    kept.remove()
}

/// For a container, snapshots whose layers are disks of the host are an overlay like any other.
fn erofs_snapshotter(containerd: &mut Containerd) -> Result<()> {
    is_kept_in(containerd, "erofs")?;
    // The layers of an image stay mounted as long as the image exists.
    containerd.ctr_ok(&["images", "rm", "--sync", IMAGE]).map(drop)
}

/// 1.6 does not have this snapshotter.
#[test]
fn blockfile_1_7() {
    run_with(Version::V1_7, &Setup::new().blockfile(), blockfile_snapshotter);
}

/// 2.1 is the first that has this snapshotter.
#[test]
fn erofs_2_1() {
    run_with(Version::V2_1, &Setup::new(), erofs_snapshotter);
}

#[test]
fn blockfile_2_1() {
    run_with(Version::V2_1, &Setup::new().blockfile(), blockfile_snapshotter);
}
