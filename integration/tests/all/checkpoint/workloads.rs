//! Complex programs continue after a restore as if nothing had happened.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use containerd_shim_protos::{api::Empty, shim::oci::CheckpointOptions};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
    terminal::Terminal,
};
use serde_json::json;
use ttrpc::Code;

use super::{
    clients::{REF, remove_what_containerd_leaves},
    refused, request,
};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(one_of_everything, memory_copied_ahead, much_memory_fetched_later, a_terminal_session);

/// How memory is copied to a checkpoint, and read from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    AtOnce,
    CopiedAhead,
    FetchedLater,
}

fn config(bundle: &Bundle, mib: u32, memory: Memory) -> Result<PathBuf> {
    let command = ["python3.13", "/workload.py", &mib.to_string()];
    bundle.config(&command, |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
        spec["process"]["env"] = json!(["PATH=/usr/bin:/bin", "LC_ALL=C", "PYTHONDONTWRITEBYTECODE=1"]);
        spec["annotations"] = json!({
            "io.machinen.lazy": (memory == Memory::FetchedLater).to_string(),
            "io.machinen.pre-dump": (memory == Memory::CopiedAhead).to_string(),
        });
        spec["linux"]["resources"] = json!({"memory": {"limit": u64::from(mib + 512) << 20}});
    })
}

/// Checkpoints the workload, restores it, and asks it for all differences.
fn continues(containerd: &mut Containerd, mib: u32, memory: Memory) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("workload.py"), include_str!("workload.py"))?;
    let config = config(&bundle, mib, memory)?;
    let mut source = Served::of(containerd, &config)?;
    let printed = containerd.root().join("printed");
    source.create(|request| request.stderr = format!("file://{}", printed.display()))?;
    source.begin()?;
    let ready = "for n in $(seq 1200); do [ -e /tmp/ready ] && exit 0; usleep 50000; done; cat /tmp/redis.log; exit 1";
    ensure!(
        source.exec_to("ready", &["sh", "-c", ready], "")? == 0,
        "the container does not get ready: {}",
        fs::read_to_string(&printed)?
    );
    let dir = containerd.root().join("images");
    let options = CheckpointOptions { open_tcp: true, file_locks: true, ..Default::default() };
    source.client.ok::<Empty>("Checkpoint", &request(&source, &dir, Some(&options))?)?;
    let log = source.shim.log()?;
    ensure!(log.contains("pre-dump=") == (memory == Memory::CopiedAhead), "odd phases: {log}");
    // A failed copy ahead only costs time, and would not be noticed otherwise.
    ensure!(!log.contains("cannot copy memory ahead"), "no pre-dump: {log}");
    // The source is unchanged too.
    as_it_was(&source)?;
    source.end()?;
    let mut restored = Served::of(containerd, &config)?;
    restored.create_from(&dir)?;
    // The shim holds the files that it still needs.
    fs::remove_dir_all(&dir)?;
    restored.begin()?;
    if memory == Memory::FetchedLater {
        let (code, message) = refused(&restored.client, &request(&restored, &dir, Some(&options))?)?;
        ensure!(
            code == Code::FAILED_PRECONDITION && message.contains("still being fetched"),
            "{code:?}: {message}"
        );
    }
    as_it_was(&restored)?;
    // By now the container has touched all of its memory, and can be checkpointed like any other.
    let again = request(&restored, &dir, Some(&options))?;
    restored.client.ok::<Empty>("Checkpoint", &again)?;
    restored.end()?;
    fs::remove_file(&printed)?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn as_it_was(served: &Served<'_>) -> Result<()> {
    let ask = "touch /tmp/go; for n in $(seq 1200); do [ -e /tmp/result ] && exec cat /tmp/result; usleep 50000; done; \
               echo no answer";
    let (status, printed) = served.shell(ask)?;
    ensure!(status == 0 && printed == "as it was", "status {status}; what differs: {printed}");
    Ok(())
}

fn one_of_everything(containerd: &mut Containerd) -> Result<()> {
    continues(containerd, 8, Memory::AtOnce)
}

fn memory_copied_ahead(containerd: &mut Containerd) -> Result<()> {
    continues(containerd, 64, Memory::CopiedAhead)
}

fn much_memory_fetched_later(containerd: &mut Containerd) -> Result<()> {
    continues(containerd, 256, Memory::FetchedLater)
}

fn a_terminal_session(containerd: &mut Containerd) -> Result<()> {
    // A signal interrupts a read, and the first size may come at any time.
    let script = "trap 'w=1; echo \"now $(stty size)\"' WINCH; n=0; echo ready; while :; do if read -r line; then \
                  n=$((n+1)); echo \"$n $line\"; elif [ \"$w\" ]; then w=; else break; fi; done; exit 6";
    let run = containerd.run(IMAGE, &["sh", "-c", script]).flag("--tty");
    let mut terminal = Terminal::run(&run.invocation()?, 80, 25)?;
    terminal.expect("ready\r")?;
    terminal.type_in("first\r")?;
    terminal.expect("1 first\r")?;
    containerd.ctr_ok(&["containers", "checkpoint", "--rw", "--image", "--task", run.container(), REF])?;
    terminal.type_in("second\r")?;
    terminal.expect("2 second\r")?;
    terminal.type_in("\x04")?;
    ensure!(terminal.wait()?.0 == 6, "the source does not end as it should");
    let second = containerd.new_id();
    let restore = containerd.ctr(["containers", "restore", "--rw", "--live", &second, REF])?;
    let mut terminal = Terminal::run(&restore, 80, 25)?;
    // The restored script knows of the first line, and not of the second.
    terminal.type_in("again\r")?;
    terminal.expect("2 again\r")?;
    terminal.type_in("\x04")?;
    let (status, seen) = terminal.wait()?;
    ensure!(status == 6, "status {status} after {seen:?}");
    containerd.ctr_ok(&["containers", "rm", &second])?;
    remove_what_containerd_leaves(containerd)?;
    containerd.ctr_ok(&["images", "rm", "--sync", REF])?;
    Ok(())
}
