//! Containers whose root file system is a directory of the user's (`ctr run --rootfs`): it has the container's writes
//! after the end.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, ctr::Run};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{on_every_containerd, on_newest_containerd};

on_every_containerd!(writes_are_in_the_directory);
on_newest_containerd!(
    a_pause_exports_to_the_directory,
    a_killed_vm_leaves_the_writes_to_the_next_start,
    two_containers_at_a_time,
    a_read_only_root_is_not_changed,
);

fn run<'a>(containerd: &'a Containerd, root: &Path, script: &str) -> Run<'a> {
    let run = containerd.run(&root.display().to_string(), &["sh", "-ec", script]);
    run.flags(&["--rootfs", "--env", "PATH=/bin:/usr/bin"])
}

/// A directory with busybox, and nothing else next to it.
fn directory(containerd: &Containerd) -> Result<PathBuf> {
    let root = Bundle::busybox(containerd)?.rootfs();
    fs::create_dir_all(root.join("old/deep"))?;
    fs::write(root.join("old/deep/file"), "old")?;
    fs::write(root.join("link-target"), "old")?;
    std::os::unix::fs::symlink("/link-target", root.join("link"))?;
    Ok(root)
}

/// Nothing of machinen's is in the directory or next to it.
fn nothing_is_left(root: &Path) -> Result<()> {
    for dir in [root, root.parent().context("no parent")?] {
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
        let names = names.collect::<Result<Vec<_>>>()?;
        ensure!(!names.iter().any(|name| name.contains("machinen")), "left in {}: {names:?}", dir.display());
    }
    Ok(())
}

fn writes_are_in_the_directory(containerd: &mut Containerd) -> Result<()> {
    let root = directory(containerd)?;
    let inode = fs::metadata(&root)?.ino();
    let script = "echo run >> /count; cat /count; rm -rf /old; mkdir /old; echo new > /old/new; \
                  echo through >> /link; rm /link-target; mkdir /link-target; chmod 1700 /link-target";
    let first = run(containerd, &root, script).ok()?;
    ensure!(first == "run\n", "{first}");
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    ensure!(read("count") == "run\n" && read("old/new") == "new\n", "the writes are not in the directory");
    ensure!(!root.join("old/deep").exists(), "what the container has removed is still there");
    ensure!(fs::metadata(root.join("link-target"))?.mode() == 0o041_700, "a file is no directory");
    ensure!(fs::read_link(root.join("link"))? == Path::new("/link-target"), "the link was followed");
    nothing_is_left(&root)?;
    // The next start sees them, and what the user has written meanwhile.
    fs::write(root.join("count"), "user\n")?;
    let second = run(containerd, &root, "echo run >> /count; cat /count; ls /old /link-target").ok()?;
    ensure!(second == "user\nrun\n/link-target:\n\n/old:\nnew\n", "{second}");
    ensure!(read("count") == "user\nrun\n", "{}", read("count"));
    ensure!(fs::metadata(&root)?.ino() == inode, "the directory was replaced");
    nothing_is_left(&root)
}

fn a_pause_exports_to_the_directory(containerd: &mut Containerd) -> Result<()> {
    let root = directory(containerd)?;
    let script = "echo one > /one; echo ready; until [ -e /continue ]; do sleep 0.1; done; rm /one; \
                  echo two > /two";
    let container = run(containerd, &root, script);
    let running = container.spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("ready")?;
    containerd.ctr_ok(&["tasks", "pause", container.container()])?;
    ensure!(fs::read_to_string(root.join("one"))? == "one\n", "not exported at the pause");
    fs::write(root.join("users"), "")?;
    nothing_is_left(&root)?;
    containerd.ctr_ok(&["tasks", "resume", container.container()])?;
    let id = container.container();
    containerd.ctr_ok(&["tasks", "exec", "--exec-id", "go", id, "touch", "/continue"])?;
    running.wait()?.ok()?;
    let present = ["one", "two", "users"].map(|name| root.join(name).exists());
    ensure!(present == [false, true, true], "one, two, users: {present:?}");
    nothing_is_left(&root)
}

fn a_killed_vm_leaves_the_writes_to_the_next_start(containerd: &mut Containerd) -> Result<()> {
    let root = directory(containerd)?;
    let container = run(containerd, &root, "echo kept > /synced; rm -r /old; sync; echo ready; sleep 1000");
    let running = container.spawn(Duration::from_secs(120))?;
    running.wait_for_stdout("ready")?;
    let inventory = containerd.inventory()?;
    let words = ["microvm", container.container()];
    let found =
        inventory.processes.iter().find(|process| words.iter().all(|word| process.command.contains(word)));
    let pid = found.with_context(|| format!("no VM in\n{inventory}"))?.pid;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    ensure!(running.wait()?.status != 0, "the VM was killed");
    ensure!(!root.join("synced").exists(), "nothing was exported");
    let seen = run(containerd, &root, "cat /synced; test -e /old || echo removed").ok()?;
    ensure!(seen == "kept\nremoved\n", "the next start printed\n{seen}");
    ensure!(fs::read_to_string(root.join("synced"))? == "kept\n", "the file is not in the directory");
    ensure!(!root.join("old").exists(), "what the container has removed is still there");
    nothing_is_left(&root)
}

/// Neither sees the other's writes while both run. Of a file that both write, the content of the last one to end stays.
fn two_containers_at_a_time(containerd: &mut Containerd) -> Result<()> {
    let root = directory(containerd)?;
    let script = |name: &str| {
        format!("echo {name} > /{name}; echo {name} > /both; echo ready; read word; ls /; cat /both")
    };
    let containers = ["one", "two"].map(|name| run(containerd, &root, &script(name)).with_stdin());
    let mut running = containers.iter().map(|container| container.spawn(Duration::from_secs(180)));
    let (Some(first), Some(second)) = (running.next(), running.next()) else { unreachable!() };
    let (mut first, mut second) = (first?, second?);
    for running in [&first, &second] {
        running.wait_for_stdout("ready")?;
    }
    let end = |running: &mut machinen_integration::process::Running| -> Result<()> {
        let mut stdin = running.stdin().context("no stdin")?;
        Ok(std::io::Write::write_all(&mut stdin, b"end\n")?)
    };
    end(&mut second)?;
    let output = second.wait()?.ok()?.text();
    ensure!(output.ends_with("two\n") && !output.contains("one"), "{output}");
    end(&mut first)?;
    let output = first.wait()?.ok()?.text();
    ensure!(output.ends_with("one\n") && !output.contains("two"), "{output}");
    ensure!(root.join("one").exists() && root.join("two").exists(), "the writes of one are lost");
    ensure!(fs::read_to_string(root.join("both"))? == "one\n", "not the content of the last one");
    nothing_is_left(&root)
}

fn a_read_only_root_is_not_changed(containerd: &mut Containerd) -> Result<()> {
    let root = directory(containerd)?;
    let script = "echo x > /new 2> /dev/null || echo refused";
    let output = run(containerd, &root, script).flag("--read-only").ok()?;
    ensure!(output == "refused\n", "{output}");
    ensure!(!root.join("new").exists(), "the directory was changed");
    nothing_is_left(&root)
}
