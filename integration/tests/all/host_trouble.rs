//! Trouble on the host: programs or files that are missing, too old or damaged, a full disk, processes that
//! die.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    paths,
    process::Invocation,
    setup::{Setup, Value},
};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{IMAGE, fails_saying, on_every_containerd, on_newest_containerd, works};

on_every_containerd!(qemu_killed, shim_killed);
on_newest_containerd!(
    qemu_missing_or_old,
    mke2fs_missing_or_old,
    assets_missing_or_damaged,
    disk_full_while_converting,
    writes_wait_until_the_host_has_space,
    one_conversion_for_many,
    damaged_rootdisk_is_rebuilt,
);

/// Runs with one key of the configuration changed, which must fail, and then with the right one.
fn fails_with(containerd: &Containerd, section: &str, key: &str, value: Value, words: &[&str]) -> Result<()> {
    containerd.configure(&fresh_cache(containerd)?.set(section, key, value))?;
    fails_saying(containerd, &containerd.run(IMAGE, &["true"]), words)
}

/// An empty rootdisk cache, so that conversions happen.
fn fresh_cache(containerd: &Containerd) -> Result<Setup> {
    let dir = containerd.root().join(format!("cache-{}", containerd.new_id()));
    fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(Setup::new().set("rootdisk", "dir", Value::path(&dir)))
}

/// A script of the test's own, as a program.
pub(crate) fn script(containerd: &Containerd, name: &str, text: &str) -> Result<PathBuf> {
    let path = containerd.root().join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn qemu_missing_or_old(containerd: &mut Containerd) -> Result<()> {
    fails_with(containerd, "vm", "qemu", Value::text("/no/such/qemu"), &["/no/such/qemu", "install"])?;
    let broken = script(containerd, "qemu-broken", "echo qemu-broken: cannot do that >&2; exit 1")?;
    fails_with(containerd, "vm", "qemu", Value::path(&broken), &["QEMU", "cannot do that", "7.2"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn mke2fs_missing_or_old(containerd: &mut Containerd) -> Result<()> {
    fails_with(containerd, "rootdisk", "mke2fs", Value::text("/no/such/mke2fs"), &["/no/such/mke2fs"])?;
    let old = script(containerd, "mke2fs-old", "echo 'mke2fs 1.42.1 (1-Jan-2012)' >&2; exit 1")?;
    fails_with(containerd, "rootdisk", "mke2fs", Value::path(&old), &["1.42", "newer is needed"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn assets_missing_or_damaged(containerd: &mut Containerd) -> Result<()> {
    let assets = containerd.root().join("assets");
    fs::create_dir(&assets)?;
    let value = || Value::path(&assets);
    let (kernel, image) = (assets.join("vmlinux"), assets.join("guest.img"));
    let kernel_name = kernel.display().to_string();
    fails_with(containerd, "assets", "dir", value(), &["vmlinux", &assets.display().to_string()])?;
    fs::copy(paths::assets().join("guest.img"), &image)?;
    fs::write(&kernel, "this is no kernel")?;
    fails_with(containerd, "assets", "dir", value(), &[&kernel_name])?;
    fs::copy(paths::assets().join("vmlinux"), &kernel)?;
    fs::write(&image, vec![7; 1 << 20])?;
    fails_with(containerd, "assets", "dir", value(), &["guest.img", "damaged"])?;
    // The start of the image is intact, so that only the guest's kernel detects the damage, and reports it on
    // the console.
    let mut damaged = fs::read(paths::assets().join("guest.img"))?;
    damaged[8 << 10..].fill(0);
    fs::write(&image, damaged)?;
    fails_with(containerd, "assets", "dir", value(), &["before its agent answered", "Kernel panic"])?;
    containerd.configure(&Setup::new())?;
    works(containerd)
}

fn disk_full_while_converting(containerd: &mut Containerd) -> Result<()> {
    let dir = containerd.root().join("small");
    fs::create_dir(&dir)?;
    let none = None::<&str>;
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    let setup = Setup::new().set("rootdisk", "dir", Value::path(&dir));
    containerd.configure(&setup)?;
    let name = dir.display().to_string();
    fails_saying(containerd, &containerd.run(IMAGE, &["true"]), &["not enough space", &name])?;
    // The template of writable layers was made in the meantime, and is complete.
    let used = used_bytes(&dir)? - used_bytes(&dir.join("writable"))?;
    ensure!(used < 64 << 10, "{used} bytes were left on the full disk");
    // The same cache serves when it has room.
    mount(none, &dir, none, MsFlags::MS_REMOUNT, Some("size=64m"))?;
    works(containerd)?;
    nix::mount::umount2(&dir, nix::mount::MntFlags::MNT_DETACH)?;
    Ok(())
}

/// A file system of a size of its own, which is unmounted when this is dropped.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    fn new(containerd: &Containerd, mib: u64) -> Result<Self> {
        let (image, dir) = (containerd.root().join("small.ext4"), containerd.root().join("small"));
        fs::create_dir(&dir)?;
        fs::File::create(&image)?.set_len(mib << 20)?;
        // No blocks for root alone, so that what is kept free is machinen's doing.
        Invocation::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0"]).arg(&image).run()?.ok()?;
        Invocation::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir).run()?.ok()?;
        Ok(Self(dir))
    }

    /// All disks are on it, of which this share is kept free.
    fn setup(&self, reserve_percent: u64) -> Setup {
        let setup = Setup::new().set("rootdisk", "dir", Value::path(&self.0.join("cache")));
        setup.set("rootdisk", "disk_reserve_percent", Value::number(reserve_percent))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if let Err(error) = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

/// The disk of a container is larger than the file system that it is on.
fn writes_wait_until_the_host_has_space(containerd: &mut Containerd) -> Result<()> {
    let small = SmallFileSystem::new(containerd, 400)?;
    containerd.configure(&small.setup(10))?;
    let ballast = small.0.join("ballast");
    Invocation::new("fallocate").args(["-l", "150M"]).arg(&ballast).run()?.ok()?;
    let rootfs = Bundle::busybox(containerd)?;
    // The file is removed, so that there is nothing to export.
    let script = "dd if=/dev/zero of=/big bs=1M count=250 conv=fsync 2>/dev/null && rm /big && echo done";
    let from = containerd.log().position();
    let container = containerd.run_spec(&rootfs.config(&["sh", "-c", script], |_| ())?);
    let running = container.spawn(Duration::from_secs(180))?;
    containerd.log().wait_for(from, |line| line.contains("writes wait"))?;
    // What QEMU had begun is complete, and nothing follows.
    let free = || -> Result<u64> {
        let space = nix::sys::statvfs::statvfs(&small.0)?;
        Ok((space.blocks_available() * space.fragment_size()) >> 20)
    };
    ensure!((1..60).contains(&free()?), "{} MiB are free", free()?);
    fs::remove_file(&ballast)?;
    containerd.log().wait_for(from, |line| line.contains("writes continue"))?;
    let output = running.wait()?.ok()?;
    ensure!(output.text() == "done\n", "{output}");
    // Without space there is no new container.
    containerd.configure(&small.setup(100))?;
    let refused = containerd.run_spec(&rootfs.config(&["true"], |_| ())?);
    fails_saying(containerd, &refused, &["not enough space", "rootdisk.disk_reserve_percent"])
}

/// The space that the files of a directory take.
fn used_bytes(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let status = entry.metadata()?;
        sum += if status.is_dir() { used_bytes(&entry.path())? } else { status.blocks() * 512 };
    }
    Ok(sum)
}

fn one_conversion_for_many(containerd: &mut Containerd) -> Result<()> {
    containerd.configure(&fresh_cache(containerd)?)?;
    let from = containerd.log().position();
    let runs: Vec<_> = (0..3).map(|_| containerd.run(IMAGE, &["echo", "well"])).collect();
    let running = runs.iter().map(|run| run.spawn(Duration::from_secs(180))).collect::<Result<Vec<_>>>()?;
    for running in running {
        ensure!(running.wait()?.ok()?.text() == "well\n", "a container did not work");
    }
    let lines = containerd.log().since(from);
    let conversions = lines.iter().filter(|line| line.contains("rootdisk: converting")).count();
    ensure!(conversions == 1, "{conversions} conversions");
    Ok(())
}

fn damaged_rootdisk_is_rebuilt(containerd: &mut Containerd) -> Result<()> {
    let dir = containerd.root().join("cache");
    fs::create_dir(&dir)?;
    containerd.configure(&Setup::new().set("rootdisk", "dir", Value::path(&dir)))?;
    works(containerd)?;
    let disk = largest_file(&dir)?.context("no rootdisk in the cache")?;
    // The file is truncated, as by a crash of the host.
    fs::OpenOptions::new().write(true).open(&disk)?.set_len(1 << 20)?;
    works(containerd)?;
    let size = fs::metadata(largest_file(&dir)?.context("no rootdisk in the cache")?)?.len();
    ensure!(size >= 2 << 30, "the rootdisk has {size} bytes");
    Ok(())
}

fn largest_file(dir: &Path) -> Result<Option<PathBuf>> {
    let mut largest: Option<(u64, PathBuf)> = None;
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let status = entry.metadata()?;
            if status.is_dir() {
                dirs.push(entry.path());
            } else if largest.as_ref().is_none_or(|(size, _)| status.len() > *size) {
                largest = Some((status.len(), entry.path()));
            }
        }
    }
    Ok(largest.map(|(_, path)| path))
}

/// A process of a running container whose command line contains all the words.
pub(crate) fn find(containerd: &Containerd, words: &[&str]) -> Result<Pid> {
    let inventory = containerd.inventory()?;
    let found =
        inventory.processes.iter().find(|process| words.iter().all(|word| process.command.contains(word)));
    let pid = found.with_context(|| format!("no process {words:?} in\n{inventory}"))?.pid;
    Ok(Pid::from_raw(i32::try_from(pid)?))
}

fn qemu_killed(containerd: &mut Containerd) -> Result<()> {
    let from = containerd.log().position();
    let run = containerd.run(IMAGE, &["sleep", "1000"]);
    let running = run.spawn(Duration::from_secs(90))?;
    containerd.log().wait_for_event(from, "/tasks/start")?;
    let qemu = find(containerd, &["microvm", run.container()])?;
    let killed = Instant::now();
    kill(qemu, Signal::SIGKILL)?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    let took = killed.elapsed();
    ensure!(took < Duration::from_secs(1), "the exit was reported {took:?} after the death of QEMU");
    let words = ["container lost", "QEMU was killed by SIGKILL"];
    let reason = |line: &&String| words.iter().all(|word| line.contains(word));
    ensure!(
        containerd.log().since(from).iter().any(|line| reason(&line)),
        "the log does not say what killed QEMU"
    );
    let output = running.wait()?;
    ensure!(output.status == 137, "{output}");
    works(containerd)
}

fn shim_killed(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let from = containerd.log().position();
    let shim = find(containerd, &["containerd-shim-machinen-v1", "-id", &id])?;
    kill(shim, Signal::SIGKILL)?;
    // containerd notices the end, runs the shim's `delete`, and makes up what the shim cannot report any
    // more.
    containerd.log().wait_for(from, |line| line.contains("shim disconnected") && line.contains(&id))?;
    containerd.ctr_output(&["tasks", "delete", "--force", &id])?;
    containerd.ctr_ok(&["containers", "delete", &id])?;
    works(containerd)
}
