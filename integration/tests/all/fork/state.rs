//! A fork has its source's state, continues independently, and is another machine.

use std::fs;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd, paths::Version, process::Invocation, setup::Setup, terminal::Terminal,
};
use serde_json::Value;

use super::{count_above, counter, end_all, fork, sh};
use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd, run_with};

on_every_containerd!(both_continue);
on_newest_containerd!(
    of_a_paused_container_later_and_again,
    a_native_snapshot,
    an_erofs_snapshot,
    a_terminal
);

fn both_continue(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &["--label", "mine=yes"])?;
    let (source, new) = (run.container(), containerd.new_id());
    let before = count_above(containerd, source, 103)?;
    sh(containerd, source, "echo before >/data/note")?;
    let output = fork(containerd, &[source, &new])?;
    ensure!(output.text() == format!("{new}\n"), "{output}");
    // State and files are the source's, and continue in both.
    let forked = count_above(containerd, &new, before)?;
    sh(containerd, source, "echo source >/data/note")?;
    count_above(containerd, &new, forked)?;
    let now = count_above(containerd, source, before)?;
    count_above(containerd, source, now)?;
    ensure!(sh(containerd, &new, "cat /data/note")? == "before", "the files of the two are the same");
    sh(containerd, &new, "echo fork >/data/note; touch /data/only-here")?;
    ensure!(
        sh(containerd, source, "cat /data/note; [ ! -e /data/only-here ]")? == "source",
        "source and fork share files"
    );
    let log = "grep -qx 101 /data/log && grep -qx $(cat /data/count) /data/log && uniq -d /data/log | wc -l";
    for id in [source, &new] {
        ensure!(sh(containerd, id, log)? == "0", "{id} has lost lines of an open file");
    }
    another_machine(containerd, source, &new)?;
    // containerd's record of the fork is like that of the source.
    let info = |id: &str| -> Result<Value> {
        Ok(serde_json::from_str(&containerd.ctr_ok(&["containers", "info", id])?)?)
    };
    let (theirs, ours) = (info(source)?, info(&new)?);
    for field in ["Image", "Runtime", "Snapshotter"] {
        ensure!(theirs[field] == ours[field], "{field}: {theirs} and {ours}");
    }
    let mut labels = theirs["Labels"].clone();
    labels["io.machinen.forked-from"] = source.into();
    ensure!(labels == ours["Labels"], "labels: {theirs} and {ours}");
    ensure!(ours["Labels"]["mine"] == "yes" && ours["SnapshotKey"] == new.as_str(), "{ours}");
    ensure!(
        ours["Spec"]["hostname"] == new.as_str()
            && ours["Spec"]["annotations"] == theirs["Spec"]["annotations"],
        "{ours}"
    );
    // The fork's writes are in its snapshot, like those of any container.
    let exit = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &new])?;
    containerd.log().wait_for_event(exit, "/tasks/exit")?;
    containerd.ctr_output(&["tasks", "rm", &new])?;
    let archive = containerd.root().join("diff.tar");
    let diff = containerd.ctr(["snapshots", "diff", &new])?.run()?.ok()?;
    fs::write(&archive, diff.stdout)?;
    let names = Invocation::new("tar").arg("-tf").arg(&archive).run()?.ok()?.text();
    fs::remove_file(&archive)?;
    ensure!(names.contains("data/only-here"), "{names}");
    containerd.ctr_ok(&["containers", "rm", &new])?;
    end_all(containerd, [source])
}

/// Names and random numbers of the two, and of their VMs.
fn another_machine(containerd: &Containerd, source: &str, new: &str) -> Result<()> {
    let ask = "cat /proc/sys/kernel/hostname /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid";
    let (theirs, ours) = (sh(containerd, source, ask)?, sh(containerd, new, ask)?);
    let both: Vec<_> = theirs.lines().zip(ours.lines()).collect();
    ensure!(both.len() == 3 && both.iter().all(|(a, b)| a != b), "{theirs}\n{ours}");
    ensure!(both[0] == (source, new), "hostnames {:?}", both[0]);
    let machine = |id: &str| -> Result<String> {
        let lines = containerd.log().since(0);
        let hostname = |line: &&String| {
            line.contains("guest is ready") && line.split(' ').any(|word| word == format!("hostname={id}"))
        };
        let line = lines.iter().find(hostname).with_context(|| format!("no line of the guest of {id}"))?;
        let word = line.split(' ').find_map(|word| word.strip_prefix("machine_id="));
        word.map(str::to_owned).with_context(|| format!("no machine id in {line}"))
    };
    let (theirs, ours) = (machine(source)?, machine(new)?);
    ensure!(theirs.len() == 32 && theirs != ours, "machine ids {theirs} and {ours}");
    Ok(())
}

/// The source stays paused; the checkpoint is kept; the fork is forked.
fn of_a_paused_container_later_and_again(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &["--hostname", "first"])?;
    let (source, second, third) = (run.container(), containerd.new_id(), containerd.new_id());
    containerd.ctr_ok(&["tasks", "pause", source])?;
    let bundle = containerd.root().join("kept");
    let kept = bundle.display().to_string();
    let output = fork(
        containerd,
        &["--json", "--lazy", "--checkpoint-dir", &kept, "--hostname", "second", source, &second],
    )?;
    let printed: Value = serde_json::from_slice(&output.stdout)?;
    let pid = printed["pid"].as_u64().unwrap_or_default();
    ensure!(printed["id"] == second.as_str() && printed["source"] == source && pid > 1, "{printed}");
    ensure!(printed["bundle"] == kept.as_str() && printed["hostname"] == "second", "{printed}");
    let tasks = containerd.ctr_ok(&["tasks", "ls"])?;
    ensure!(tasks.contains("PAUSED") && tasks.contains(&pid.to_string()), "{tasks}");
    containerd.machinen(&["snapshot", "verify", &kept])?.run()?.ok()?;
    fs::remove_dir_all(&bundle)?;
    let count = count_above(containerd, &second, 103)?;
    ensure!(sh(containerd, &second, "hostname")? == "second", "another hostname");
    containerd.ctr_ok(&["tasks", "resume", source])?;
    ensure!(sh(containerd, source, "hostname")? == "first", "the source has another hostname");
    containerd.log().wait_for(0, |line| line.contains("memory was fetched from its checkpoint"))?;
    fork(containerd, &[&second, &third])?;
    count_above(containerd, &third, count)?;
    ensure!(sh(containerd, &third, "hostname")? == third, "another hostname");
    end_all(containerd, [source, &second, &third])
}

/// A shell in a terminal: the fork's terminal has no peer, and is a terminal all the same.
fn a_terminal(containerd: &mut Containerd) -> Result<()> {
    let script = "n=0; while read -r line; do n=$((n+1)); echo \"$n $line\"; echo $n >/lines; done";
    let run = containerd.run(IMAGE, &["sh", "-c", script]).flag("--tty");
    let mut terminal = Terminal::run(&run.invocation()?, 80, 25)?;
    let (source, new) = (run.container(), containerd.new_id());
    terminal.type_in("first\r")?;
    terminal.expect("1 first\r")?;
    fork(containerd, &[source, &new])?;
    terminal.type_in("second\r")?;
    terminal.expect("2 second\r")?;
    let tty = "cat /lines; [ -c $(readlink /proc/1/fd/0) ] && stty size </proc/1/fd/0";
    ensure!(sh(containerd, &new, tty)? == "1\n25 80", "no terminal: {}", sh(containerd, &new, tty)?);
    terminal.type_in("\x04")?;
    terminal.wait()?;
    end_all(containerd, [new.as_str()])
}

fn a_native_snapshot(containerd: &mut Containerd) -> Result<()> {
    apart(containerd, "native")
}

fn an_erofs_snapshot(containerd: &mut Containerd) -> Result<()> {
    apart(containerd, "erofs")?;
    // The layers of an image stay mounted as long as the image exists.
    containerd.ctr_ok(&["images", "rm", "--sync", IMAGE]).map(drop)
}

#[test]
fn a_disk_of_the_snapshotters() {
    run_with(Version::V2_1, &Setup::new().blockfile(), |containerd| apart(containerd, "blockfile"));
}

/// The same with a snapshotter that keeps whole root file systems.
fn apart(containerd: &Containerd, snapshotter: &str) -> Result<()> {
    let run = counter(containerd, &["--snapshotter", snapshotter])?;
    let (source, new) = (run.container(), containerd.new_id());
    sh(containerd, source, "rm /bin/true; echo before >/data/note")?;
    fork(containerd, &[source, &new])?;
    let count = count_above(containerd, &new, 102)?;
    sh(containerd, source, "echo source >/data/note")?;
    ensure!(
        sh(containerd, &new, "cat /data/note; test -e /bin/true || echo gone")? == "before\ngone",
        "other files"
    );
    count_above(containerd, source, count)?;
    count_above(containerd, &new, count)?;
    end_all(containerd, [source, &new])
}
