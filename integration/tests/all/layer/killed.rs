//! After a VM or a shim was killed, the next start finds what the container has synced.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::containerd::Containerd;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{DISK, Kept};
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(a_killed_vm_keeps_what_was_synced);
on_newest_containerd!(a_killed_shim_keeps_what_was_synced, a_killed_vm_keeps_what_was_synced_native);

/// Kills a process of a container that has synced, and checks what the next start finds.
fn killed(
    containerd: &Containerd,
    snapshotter: &'static str,
    words: &dyn Fn(&str) -> Vec<String>,
    wait: &str,
) -> Result<()> {
    let script = "if [ -e /synced ]; then cat /synced; test -e /etc/secret || echo removed; exit; fi; \
                  echo kept > /synced; rm /etc/secret; sync; echo ready; sleep 1000";
    let run = containerd.run(IMAGE, &["sh", "-ec", script]).flag("--snapshotter").flag(snapshotter);
    // In the foreground, so that its output shows when it is ready; without --rm, so that the snapshot stays.
    let id = run.container().to_owned();
    let running = run.kept().spawn(Duration::from_secs(90))?;
    running.wait_for_stdout("ready")?;
    let kept = Kept { containerd, id, snapshotter };
    let upper = kept.dir()?;
    ensure!(!upper.join("synced").exists(), "nothing was exported yet");
    let from = containerd.log().position();
    let words = words(&kept.id);
    let inventory = containerd.inventory()?;
    let found =
        inventory.processes.iter().find(|process| words.iter().all(|word| process.command.contains(word)));
    let pid = found.with_context(|| format!("no process {words:?} in\n{inventory}"))?.pid;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    containerd.log().wait_for(from, |line| line.contains(wait))?;
    let ended = running.wait()?;
    ensure!(ended.status != 0, "{ended}");
    containerd.ctr_output(&["tasks", "delete", "--force", &kept.id])?;
    let separate = snapshotter == "overlayfs";
    ensure!(upper.with_file_name(DISK).exists() == separate, "the disk is gone with what was on it");
    let seen = kept.again()?;
    ensure!(seen == "kept\nremoved\n", "the next start printed\n{seen}");
    ensure!(fs::read_to_string(upper.join("synced"))? == "kept\n", "the file is not in the snapshot");
    ensure!(!upper.with_file_name(DISK).exists(), "the disk is still there");
    kept.remove()
}

fn a_killed_vm_keeps_what_was_synced(containerd: &mut Containerd) -> Result<()> {
    killed(containerd, "overlayfs", &|id| vec!["microvm".to_owned(), id.to_owned()], "/tasks/exit")
}

fn a_killed_vm_keeps_what_was_synced_native(containerd: &mut Containerd) -> Result<()> {
    killed(containerd, "native", &|id| vec!["microvm".to_owned(), id.to_owned()], "/tasks/exit")
}

fn a_killed_shim_keeps_what_was_synced(containerd: &mut Containerd) -> Result<()> {
    let words = |id: &str| vec!["containerd-shim-machinen-v1".to_owned(), "-id".to_owned(), id.to_owned()];
    killed(containerd, "overlayfs", &words, "/tasks/delete")?;
    // ctr keeps its fifos when the shim is lost, whatever the runtime.
    let fifos = containerd.root().join("fifo");
    for dir in fs::read_dir(&fifos)? {
        fs::remove_dir_all(dir?.path())?;
    }
    Ok(())
}
