//! A checkpoint that fails leaves the source running, and nothing of the checkpoint.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{CheckpointTaskRequest, DeleteResponse, Empty, StartResponse, Status},
    shim::oci::CheckpointOptions,
};
use machinen_integration::{
    bundle::{self, Bundle},
    containerd::Containerd,
    process::DEADLINE,
    served::Served,
    setup::{Setup, Value},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use ttrpc::Code;

use super::{COUNTER, api::complete, checkpoint, counts_from, refused, request};
use crate::harness::on_newest_containerd;

on_newest_containerd!(
    failures_leave_the_source_running,
    no_room_for_what_the_guest_writes,
    vm_killed_while_checkpointing,
    shim_killed_while_writing
);

fn failures_leave_the_source_running(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // A connection of the container with itself, which the request does not ask to keep.
    let script = format!("(nc -l -p 7000 -e cat &) ; sleep 1; sleep 1000 | nc 127.0.0.1 7000 & {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |_| ())?;
    let served = Served::run(containerd, &config)?;
    let dir = containerd.root().join("images");
    let connected = "until grep -q ' 01 ' /proc/net/tcp; do usleep 50000; done; exec true";
    ensure!(served.exec_to("connected", &["sh", "-c", connected], "")? == 0, "no connection");
    let fails = |request: &CheckpointTaskRequest, code: Code, words: &[&str]| {
        let (found, message) = refused(&served.client, request)?;
        ensure!(found == code, "{found:?} instead of {code:?}: {message}");
        for word in words {
            ensure!(message.contains(word), "{word:?} is not in {message}");
        }
        ensure!(!dir.exists(), "something is left of a checkpoint that failed");
        let status = served.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
        ensure!(status == 0, "the counter does not continue: {status}");
        served.is("", Status::RUNNING, served.pid)
    };
    // The error contains CRIU's message.
    let plain = request(&served, &dir, None)?;
    fails(&plain, Code::FAILED_PRECONDITION, &["criu cannot checkpoint", "tcp"])?;
    // A directory that does not exist, and a full file system.
    let nowhere = request(&served, Path::new("/nowhere/at/all"), None)?;
    let open = CheckpointOptions { open_tcp: true, ..Default::default() };
    let nowhere = CheckpointTaskRequest { options: request(&served, &dir, Some(&open))?.options, ..nowhere };
    fails(&nowhere, Code::INTERNAL, &["/nowhere/at/all"])?;
    let small = containerd.root().join("small");
    fs::create_dir(&small)?;
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let full = fails(
        &request(&served, &small.join("images"), Some(&open))?,
        Code::RESOURCE_EXHAUSTED,
        &["not enough space", "small"],
    );
    let left = fs::read_dir(&small)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    umount(&small)?;
    full?;
    ensure!(left.is_empty(), "left on the full disk: {left:?}");
    fs::remove_dir(&small)?;
    // A second directory that does not exist, after the first was written.
    let elsewhere =
        CheckpointOptions { open_tcp: true, image_path: "/nowhere/at/all".to_owned(), ..Default::default() };
    fails(&request(&served, &dir, Some(&elsewhere))?, Code::INTERNAL, &["/nowhere/at/all"])?;
    // An added process is not a descendant of the init.
    let sleep = served.exec("added", &["sleep", "1000"]);
    served.client.ok::<Empty>("Exec", &sleep)?;
    served.client.ok::<StartResponse>("Start", &served.start("added"))?;
    fails(&request(&served, &dir, Some(&open))?, Code::FAILED_PRECONDITION, &["processes were added"])?;
    served.client.ok::<Empty>("Kill", &served.kill("added", 9))?;
    served.wait("added")?;
    served.client.ok::<DeleteResponse>("Delete", &served.delete("added"))?;
    // Without such obstacles, a second try works.
    served.client.ok::<Empty>("Checkpoint", &request(&served, &dir, Some(&open))?)?;
    complete(&dir)?;
    served.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn no_room_for_what_the_guest_writes(containerd: &mut Containerd) -> Result<()> {
    let cache = containerd.root().join("small-cache");
    fs::create_dir(&cache)?;
    mount(Some("tmpfs"), &cache, Some("tmpfs"), MsFlags::empty(), Some("size=30m"))?;
    containerd.configure(&Setup::new().set("rootdisk", "dir", Value::path(&cache)))?;
    let tried = in_little_room(containerd, &cache);
    umount2(&cache, MntFlags::MNT_DETACH)?;
    fs::remove_dir(&cache)?;
    tried
}

fn in_little_room(containerd: &Containerd, cache: &Path) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // The content of a tmpfs is part of a checkpoint.
    let script = format!("head -c 40m /dev/urandom >/tmp/much; {COUNTER}");
    let config = bundle.config(&["sh", "-c", &script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
    })?;
    let served = Served::run(containerd, &config)?;
    let continues = || {
        let status = served.exec_to("look", &["sh", "-c", &counts_from(100)], "")?;
        ensure!(status == 0, "the counter does not continue: {status}");
        Ok(())
    };
    continues()?;
    let dir = containerd.root().join("images");
    let (code, message) = refused(&served.client, &request(&served, &dir, None)?)?;
    ensure!(code == Code::RESOURCE_EXHAUSTED && message.contains("not enough space"), "{code:?}: {message}");
    ensure!(!dir.exists(), "something is left of a checkpoint that failed");
    continues()?;
    mount(Some("tmpfs"), cache, Some("tmpfs"), MsFlags::MS_REMOUNT, Some("size=500m"))?;
    checkpoint(&served, &dir)?;
    complete(&dir)?;
    continues()?;
    served.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}

fn vm_killed_while_checkpointing(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let served = Served::run(containerd, &bundle.config(&["sleep", "1000"], |_| ())?)?;
    let dir = containerd.root().join("images");
    let inventory = containerd.inventory()?;
    let qemu = inventory.processes.iter().find(|process| process.command.contains("microvm"));
    let qemu = qemu.context("no QEMU")?.pid;
    let request = request(&served, &dir, None)?;
    let before = nameless_files(qemu)?;
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| refused(&served.client, &request));
        let end = Instant::now() + DEADLINE;
        // QEMU opens the disk onto which the guest dumps.
        while nameless_files(qemu).is_ok_and(|files| files <= before) && Instant::now() < end {
            #[expect(clippy::disallowed_methods, reason = "another process's descriptors have no event")]
            thread::sleep(Duration::from_millis(10));
        }
        let killed = kill(Pid::from_raw(qemu.cast_signed()), Signal::SIGKILL);
        let answer = answer.join().expect("no panic");
        killed?;
        answer
    });
    let (code, message) = answer?;
    ensure!(code != Code::OK && !message.is_empty(), "{code:?}");
    ensure!(!dir.exists(), "something is left of a checkpoint that failed");
    let exit = served.wait("")?.exit_status;
    ensure!(exit == 137, "the container ended with {exit}");
    served.end_stopped()
}

/// The shim is killed when it has begun to write: the remains are not accepted as a checkpoint.
fn shim_killed_while_writing(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "(head -c 100m /dev/zero; touch /ready; exec sleep 1000) | tail -c 100m";
    let served = Served::run(containerd, &bundle.config(&["sh", "-c", script], |_| ())?)?;
    let ready = "until [ -e /ready ]; do usleep 50000; done";
    ensure!(served.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    let dir = containerd.root().join("images");
    let request = request(&served, &dir, None)?;
    let inventory = containerd.inventory()?;
    let shim = inventory.processes.iter().find(|process| process.command.contains(&served.shim.id));
    let shim = shim.context("no shim")?;
    ensure!(shim.command.contains("containerd-shim-machinen-v1"), "{}", shim.command);
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| served.client.ok::<Empty>("Checkpoint", &request));
        let end = Instant::now() + DEADLINE;
        let begun = || fs::read_dir(&dir).is_ok_and(|mut files| files.next().is_some());
        while !begun() && Instant::now() < end {
            #[expect(clippy::disallowed_methods, reason = "the creation of a file has no event")]
            thread::sleep(Duration::from_millis(1));
        }
        let killed = kill(Pid::from_raw(shim.pid.cast_signed()), Signal::SIGKILL);
        let answer = answer.join().expect("no panic");
        killed.map(|()| answer)
    });
    ensure!(answer?.is_err(), "the shim has answered before it was killed");
    ensure!(!dir.join("machinen.json").exists(), "the remains look like a checkpoint");
    let refused = containerd.machinen(&["snapshot", "inspect"])?.arg(&dir).run()?;
    let printed = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status != 0 && printed.contains("not a checkpoint"), "{printed}");
    served.shim.delete()?;
    fs::remove_dir_all(&served.shim.bundle)?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// The number of files without a name that a process has open.
fn nameless_files(pid: u32) -> Result<usize> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    Ok(links.filter(|link| link.to_string_lossy().ends_with(" (deleted)")).count())
}
