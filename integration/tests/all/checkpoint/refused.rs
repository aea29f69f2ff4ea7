//! A container that could not be restored is not checkpointed; the error names the process and the reason.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{api::Status, shim::oci::CheckpointOptions};
use machinen_integration::{bundle::Bundle, containerd::Containerd, served::Served};
use ttrpc::Code;

use super::{checkpoint, python, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(what_cannot_be_restored);

/// The behaviour of a process (see refused.py), and the error of a checkpoint then.
const KINDS: [(&str, &[&str]); 24] = [
    ("uts", &["process ", "(python3.13) is in another uts namespace than the container's first process"]),
    ("ipc", &["is in another ipc namespace"]),
    ("time", &["another time namespace"]),
    ("time-for-children", &["has another time namespace for its children"]),
    ("net", &["is in another net namespace"]),
    ("user", &["is in another user namespace"]),
    ("cgroup", &["is in another cgroup namespace"]),
    ("pid", &["another pid namespace"]),
    ("memfd-program", &["executes a program from a memfd"]),
    ("links", &["process ", " uses /file-", "which was removed and has other hard links"]),
    ("links-mapped", &[" uses /map-", "which was removed and has other hard links"]),
    ("links-program", &[" uses /program-", "which was removed and has other hard links"]),
    (
        "huge-pages",
        &["uses huge pages (/anon_hugepage), of which another VM has none: that cannot be restored"],
    ),
    ("lock-mapped", &["holds a record lock on /locked, which it has also mapped"]),
    (
        "socket-links",
        &[
            "process ",
            " has a UNIX socket that was bound to /tmp/socket-links and whose file has other hard links",
        ],
    ),
    (
        "socket-elsewhere",
        &["/tmp/socket-elsewhere and whose file was linked into another directory and removed"],
    ),
    (
        "socket-relative",
        &["has a UNIX socket that was bound to relative and whose file is now /tmp/absolute"],
    ),
    ("io-uring", &["uses io_uring (where vm.io_uring", "that cannot be restored"]),
    ("overlay", &["has an overlay mounted at /tmp/merged"]),
    ("deadline", &["has a thread with the scheduling policy SCHED_DEADLINE"]),
    ("traced", &["is traced by another process"]),
    ("backlog", &["criu cannot checkpoint it: process ", "(python3.13): unix: Non-empty write queue"]),
    ("packets", &["(python3.13): The packetized mode for pipes is not supported yet"]),
    ("dead-leader", &["Zombies with threads are not supported"]),
];

fn what_cannot_be_restored(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::with_workloads(containerd)?;
    fs::write(bundle.rootfs().join("replaced"), "old".repeat(4000))?;
    let capabilities = ["CAP_SYS_ADMIN", "CAP_SYS_NICE", "CAP_KILL", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"];
    let config = python(&bundle, "refused.py", include_str!("refused.py"), &capabilities)?;
    let served = Served::run(containerd, &config)?;
    let dir = containerd.root().join("images");
    for (kind, words) in KINDS {
        begin(&served, kind)?;
        let exit = CheckpointOptions { exit: true, ..Default::default() };
        let (code, message) = refused(&served.client, &request(&served, &dir, Some(&exit))?)
            .with_context(|| format!("{kind} is not refused"))?;
        ensure!(code == Code::FAILED_PRECONDITION, "{kind}: {code:?}: {message}");
        for word in words {
            ensure!(message.contains(word), "{kind}: {word:?} is not in {message}");
        }
        // The error has one reason, without the messages of CRIU's clean-up.
        ensure!(!message.contains("failed with -1") && !message.contains("FAILED"), "{kind}: {message}");
        ensure!(!dir.exists(), "{kind}: something is left of a checkpoint that failed");
        served.is("", Status::RUNNING, served.pid)?;
        end(&served).with_context(|| format!("{kind}: it does not run on"))?;
    }
    // Similar behaviour that can be restored.
    for kind in ["links-tmpfs", "replaced", "socket-removed"] {
        begin(&served, kind)?;
        restores(containerd, &served, &config, &dir).with_context(|| kind)?;
        end(&served)?;
    }
    served.end()
}

fn begin(served: &Served<'_>, kind: &str) -> Result<()> {
    let script = format!(
        "rm -f /ready; echo {kind} >/kind.new; mv /kind.new /kind; until [ -e /ready ]; do usleep 20000; done; cat /ready"
    );
    let (status, text) = served.shell(&script)?;
    ensure!(status == 0 && text.is_empty(), "{kind}: status {status}: {text}");
    Ok(())
}

fn end(served: &Served<'_>) -> Result<()> {
    let script = "rm -f /idle /kind; until [ -e /idle ]; do usleep 20000; done";
    ensure!(served.exec_to("end", &["sh", "-c", script], "")? == 0, "the process does not answer");
    Ok(())
}

fn restores(containerd: &Containerd, served: &Served<'_>, config: &Path, dir: &Path) -> Result<()> {
    checkpoint(served, dir)?;
    let restored = Served::restored(containerd, config, dir)?;
    // The restored container has no snapshot, so the file that keeps its child alive is missing.
    let script = "until [ -e /idle ]; do usleep 20000; done";
    ensure!(restored.exec_to("idle", &["sh", "-c", script], "")? == 0, "the restored does not answer");
    restored.end()?;
    Ok(fs::remove_dir_all(dir)?)
}
