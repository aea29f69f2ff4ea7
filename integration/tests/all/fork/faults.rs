//! Forks that fail: the source continues to run, nothing of the new container is left, and the next try
//! works.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    paths,
    process::Running,
    setup::{Setup, Value},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{count_above, counter, end_all, eventually, fork, forking, nothing_of};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(
    refused_before_anything_happens,
    no_memory_for_one_more,
    no_room_for_the_images,
    interrupted_while_it_restores,
    killed_vm_of_the_fork,
    killed_vm_of_the_source,
    killed_fork,
);

/// The output of a fork that fails; the source continues to run, and nothing of the new container is left.
fn fails(containerd: &Containerd, args: &[&str], words: &[&str]) -> Result<()> {
    let before = containerd.inventory()?;
    let output = forking(containerd, args)?.run()?;
    failed(containerd, args, words, output.status, &output.error_text())?;
    containerd.settle(&before)
}

pub(super) fn failed(
    containerd: &Containerd,
    args: &[&str],
    words: &[&str],
    status: i32,
    printed: &str,
) -> Result<()> {
    ensure!(status == 1, "the fork ended with {status}: {printed}");
    for word in words {
        ensure!(printed.contains(word), "{word:?} is missing from the user's message: {printed}");
    }
    ensure!(!printed.contains("undoing a failed fork"), "the fork could not be undone: {printed}");
    for noise in ["panicked at", ".rs:", "Os {", "source:", "Status {"] {
        ensure!(!printed.contains(noise), "{noise:?} is in the user's message: {printed}");
    }
    if std::env::var_os("MACHINEN_TEST_SHOW").is_some() {
        println!("{}", printed.trim());
    }
    nothing_of(containerd, args.last().context("no id")?)
}

pub(super) fn continues(containerd: &Containerd, source: &str) -> Result<()> {
    let tasks = containerd.ctr_ok(&["tasks", "ls"])?;
    let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(source));
    ensure!(line.is_some_and(|line| line.contains("RUNNING")), "the source does not run: {tasks}");
    let now = count_above(containerd, source, 100)?;
    count_above(containerd, source, now).map(drop)
}

pub(super) fn works(containerd: &Containerd, source: &str, new: &str) -> Result<()> {
    continues(containerd, source)?;
    fork(containerd, &[source, new])?;
    count_above(containerd, new, 102)?;
    continues(containerd, source)?;
    end_all(containerd, [source, new])
}

fn refused_before_anything_happens(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let checkpoints = containerd.log().position();
    fails(containerd, &["nothing", &new], &["no container \"nothing\"", containerd.namespace()])?;
    let theirs = containerd.idle(IMAGE, Some(paths::RUNC))?;
    fails(containerd, &[&theirs, &new], &["io.containerd.runc.v2", "io.machinen.v1"])?;
    let output = forking(containerd, &[source, &theirs])?.run()?;
    ensure!(output.status == 1 && output.error_text().contains("exists already"), "{output}");
    containerd.end(&theirs)?;
    containerd.ctr_ok(&["containers", "create", "--runtime", &paths::runtime(), IMAGE, &theirs])?;
    fails(containerd, &[&theirs, &new], &["does not run", "has no task"])?;
    containerd.ctr_ok(&["containers", "rm", &theirs])?;
    // The name of the new container's snapshot is taken.
    containerd.ctr_ok(&["snapshots", "prepare", &new])?;
    let output = forking(containerd, &[source, &new])?.run()?;
    ensure!(output.status == 1 && output.error_text().contains("there is a snapshot"), "{output}");
    containerd.ctr_ok(&["snapshots", "rm", &new])?;
    let used = containerd.root().join("tmp");
    fs::write(used.join("mine"), "")?;
    let used = used.display().to_string();
    fails(containerd, &["--checkpoint-dir", &used, source, &new], &["is not empty", "--checkpoint-dir"])?;
    fs::remove_file(Path::new(&used).join("mine"))?;
    fails(containerd, &["--checkpoint-dir", "/no/where", source, &new], &["/no"])?;
    fails(containerd, &["--hostname", "a b", source, &new], &["\"a b\"", "hostname"])?;
    let unreachable = containerd.machinen(&["fork", "--address", "/nowhere.sock", source, &new])?.run()?;
    ensure!(
        unreachable.status == 1
            && unreachable.error_text().contains("cannot reach containerd at /nowhere.sock"),
        "{unreachable}"
    );
    let log = containerd.log().since(checkpoints);
    ensure!(!log.iter().any(|line| line.contains("/tasks/checkpointed")), "the source was checkpointed");
    works(containerd, source, &new)
}

fn no_memory_for_one_more(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let full = Setup::new().set("vm", "memory_reserve_percent", Value::number(100));
    let words = ["not enough memory on this host", "vm.memory_reserve_percent"];
    containerd.configure(&full)?;
    let checkpoints = containerd.log().position();
    fails(containerd, &[source, &new], &words)?;
    let log = containerd.log().since(checkpoints);
    ensure!(!log.iter().any(|line| line.contains("/tasks/checkpointed")), "the source was checkpointed");
    // There is enough memory at the beginning, and not when the VM starts.
    let roomy = containerd.root().join("roomy.toml");
    fs::copy(containerd.root().join("machinen.toml"), &roomy)?;
    let text =
        fs::read_to_string(&roomy)?.replace("memory_reserve_percent = 100", "memory_reserve_percent = 0");
    fs::write(&roomy, text)?;
    let before = containerd.inventory()?;
    let output = forking(containerd, &[source, &new])?.env("MACHINEN_CONFIG", &roomy).run()?;
    failed(containerd, &[source, &new], &words, output.status, &output.error_text())?;
    containerd.settle(&before)?;
    containerd.configure(&Setup::new())?;
    works(containerd, source, &new)
}

fn no_room_for_the_images(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let small = containerd.root().join("small");
    fs::create_dir(&small)?;
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let bundle = small.join("images");
    let tried = fails(
        containerd,
        &["--checkpoint-dir", &bundle.display().to_string(), source, &new],
        &["cannot checkpoint", "not enough space"],
    );
    let left = bundle.exists();
    umount2(&small, MntFlags::MNT_DETACH)?;
    tried?;
    ensure!(!left, "the images are left");
    works(containerd, source, &new)
}

/// Waits for a line of the shims or of containerd.
pub(super) fn at(containerd: &Containerd, from: usize, word: &str) -> Result<()> {
    containerd.log().wait_for(from, |line| line.contains(word)).map(drop)
}

fn interrupted_while_it_restores(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let before = containerd.inventory()?;
    // During the checkpoint, and during the restore.
    for (moment, signal) in [("/containers/create", Signal::SIGINT), ("/tasks/checkpointed", Signal::SIGTERM)]
    {
        let from = containerd.log().position();
        let running = forking(containerd, &[source, &new])?.spawn()?;
        at(containerd, from, moment)?;
        kill(pid(&running), signal)?;
        let output = running.wait()?;
        failed(
            containerd,
            &[source, &new],
            &["interrupted by", signal.as_str()],
            output.status,
            &output.error_text(),
        )?;
        containerd.settle(&before)?;
        continues(containerd, source)?;
    }
    works(containerd, source, &new)
}

fn pid(running: &Running) -> Pid {
    Pid::from_raw(running.pid().cast_signed())
}

/// QEMU's processes.
fn machines(containerd: &Containerd) -> Result<Vec<u32>> {
    let all = containerd.inventory()?.processes;
    Ok(all.iter().filter(|process| process.command.contains("microvm")).map(|process| process.pid).collect())
}

fn killed_vm_of_the_fork(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let (before, first) = (containerd.inventory()?, machines(containerd)?);
    let running = forking(containerd, &[source, &new])?.spawn()?;
    let mut second = None;
    eventually("a second VM", || {
        second = machines(containerd)?.into_iter().find(|pid| !first.contains(pid));
        Ok(second.is_some())
    })?;
    kill(Pid::from_raw(second.context("no pid")?.cast_signed()), Signal::SIGKILL)?;
    let output = running.wait()?;
    // A clone that ends is replaced by a VM that boots; either way the fork is complete, or nothing of it is
    // left.
    if output.status == 0 {
        count_above(containerd, &new, 102)?;
        end_all(containerd, [new.as_str()])?;
        return works(containerd, source, &containerd.new_id());
    }
    failed(containerd, &[source, &new], &["cannot restore"], output.status, &output.error_text())?;
    containerd.settle(&before)?;
    works(containerd, source, &new)
}

/// Without the source's VM the fork cannot continue; nothing of it is left either.
fn killed_vm_of_the_source(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let qemu = machines(containerd)?;
    let from = containerd.log().position();
    let running = forking(containerd, &[source, &new])?.spawn()?;
    at(containerd, from, "/containers/create")?;
    kill(Pid::from_raw(qemu[0].cast_signed()), Signal::SIGKILL)?;
    let output = running.wait()?;
    failed(containerd, &[source, &new], &["cannot checkpoint", source], output.status, &output.error_text())?;
    containerd.ctr_output(&["tasks", "rm", source])?;
    containerd.ctr_ok(&["containers", "rm", source])?;
    Ok(())
}

/// No process is left to undo the fork: the source runs nevertheless, and the next fork removes the images.
fn killed_fork(containerd: &mut Containerd) -> Result<()> {
    let run = counter(containerd, &[])?;
    let (source, new) = (run.container(), containerd.new_id());
    let cache: PathBuf = containerd.root().join("cache");
    fs::create_dir(&cache)?;
    containerd.configure(&Setup::new().set("rootdisk", "dir", Value::path(&cache)))?;
    let from = containerd.log().position();
    let running = forking(containerd, &[source, &new])?.deadline(Duration::from_secs(60)).spawn()?;
    at(containerd, from, "writes are in its snapshot")?;
    kill(pid(&running), Signal::SIGKILL)?;
    ensure!(running.wait()?.status == 137, "the fork was not killed");
    // The shim finishes the request.
    at(containerd, from, "container checkpointed")?;
    continues(containerd, source)?;
    containerd.ctr_ok(&["containers", "rm", &new])?;
    for lease in containerd.ctr_ok(&["leases", "ls", "--quiet"])?.split_whitespace() {
        containerd.ctr_ok(&["leases", "rm", "--sync", lease])?;
    }
    works(containerd, source, &new)?;
    let left = fs::read_dir(cache.join("forks"))?.count();
    ensure!(left == 0, "{left} directories of images are left");
    Ok(fs::remove_dir_all(&cache)?)
}
