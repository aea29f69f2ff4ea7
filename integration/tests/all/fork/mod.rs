//! `machinen fork`: a second container that continues from the state of a running one.

mod connections;
mod existing;
mod faults;
mod many;
mod state;
mod volumes;

use std::{fs, thread, time::Instant};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    ctr::Run,
    process::{DEADLINE, Invocation, Output},
};

use crate::harness::IMAGE;

/// Counts in memory, writes the count to a file, and appends every count to another file that it keeps open.
const COUNTER: &str = "mkdir /data; exec 5>>/data/log; i=100; while :; do i=$((i+1)); echo $i >/data/new; echo $i >&5; \
                       mv /data/new /data/count; usleep 50000; done";

/// `machinen fork` with these arguments.
pub(crate) fn forking(containerd: &Containerd, args: &[&str]) -> Result<Invocation> {
    let fork = containerd.machinen(&["fork"])?.arg("--address").arg(containerd.socket());
    Ok(fork
        .args(["--namespace", containerd.namespace()])
        .args(args)
        .env("TMPDIR", containerd.root().join("tmp")))
}

pub(crate) fn fork(containerd: &Containerd, args: &[&str]) -> Result<Output> {
    let output = forking(containerd, args)?.run()?.ok()?;
    nothing_but_the_fork(containerd)?;
    Ok(output)
}

/// A container in the background, whose count has begun.
fn counter<'a>(containerd: &'a Containerd, flags: &[&str]) -> Result<Run<'a>> {
    let run = containerd.run(IMAGE, &["sh", "-c", COUNTER]).detached().flag("--null-io").flags(flags);
    run.ok()?;
    count_above(containerd, run.container(), 102)?;
    Ok(run)
}

/// The output of a shell command in a container.
pub(crate) fn sh(containerd: &Containerd, id: &str, script: &str) -> Result<String> {
    let exec = containerd.new_id();
    let text = containerd.ctr_ok(&["tasks", "exec", "--exec-id", &exec, id, "sh", "-c", script])?;
    Ok(text.trim().to_owned())
}

/// The counter's value, as soon as it exceeds `least`.
fn count_above(containerd: &Containerd, id: &str, least: u32) -> Result<u32> {
    let ask = format!(
        "until read -r count 2>/dev/null </data/count && [ $count -gt {least} ]; do usleep 50000; done; echo $count"
    );
    let count = sh(containerd, id, &ask)?;
    count.parse().with_context(|| format!("odd count {count:?}"))
}

/// No leases, images or content of a checkpoint are left.
fn nothing_but_the_fork(containerd: &Containerd) -> Result<()> {
    let leases = containerd.ctr_ok(&["leases", "ls", "--quiet"])?;
    ensure!(!leases.contains("machinen-fork"), "a lease is left: {leases}");
    let content = containerd.ctr_ok(&["content", "ls"])?;
    ensure!(!content.contains("checkpoint"), "content is left: {content}");
    let left = fs::read_dir(containerd.root().join("tmp"))?.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("checkpoint")).collect();
    ensure!(left.is_empty(), "containerd has left {left:?}");
    Ok(())
}

/// Nothing is left of a fork that failed: no container, snapshot or task of this id.
fn nothing_of(containerd: &Containerd, new: &str) -> Result<()> {
    for listed in [&["containers", "ls"][..], &["snapshots", "ls"], &["tasks", "ls"]] {
        let text = containerd.ctr_ok(listed)?;
        let found = text.lines().any(|line| line.split_whitespace().next() == Some(new));
        ensure!(!found, "{new} is in {listed:?}: {text}");
    }
    nothing_but_the_fork(containerd)
}

fn end_all<'a>(containerd: &Containerd, ids: impl IntoIterator<Item = &'a str>) -> Result<()> {
    ids.into_iter().try_for_each(|id| containerd.end(id))
}

/// Waits for a condition that no event reports.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !done()? {
        ensure!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        #[expect(clippy::disallowed_methods, reason = "no event reports it")]
        thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(())
}
