//! Memory that a clone's container frees returns to the host, and is not taken from the template; memory that
//! clones have added to the template is freed with the last clone.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    process::DEADLINE,
    setup::{Setup, Value},
    templates::Templates,
};

use super::{lines_with, origin, runs_from, with_template};
use crate::harness::on_newest_containerd;

on_newest_containerd!(freed_memory_returns, growth_goes_with_the_last_clone, memory_is_copied_ahead);

const TOUCHED_KIB: u64 = 150 << 10;

/// The guest reports what has been free for two seconds; the rest is for a busy machine.
const RETURN_DEADLINE: Duration = Duration::from_secs(60);

fn freed_memory_returns(containerd: &mut Containerd) -> Result<()> {
    let (templates, template) = with_template(containerd)?;
    let memory = File::open(format!("/proc/{}/fd/3", template.holder))?;
    let allocated = memory.metadata()?.blocks();
    let bundle = Bundle::busybox(containerd)?;
    let script = "echo ready; read go; dd if=/dev/zero of=/scratch/file bs=1M count=150 2>/dev/null; echo touched; \
                  read go; rm /scratch/file; echo freed; read go; sha256sum /bin/busybox";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/scratch", "tmpfs", "tmpfs", &["size=200m"]));
    })?;
    let from = containerd.log().position();
    let run = containerd.run_spec(&config).with_stdin();
    let mut running = run.spawn(DEADLINE + RETURN_DEADLINE)?;
    let mut stdin = running.stdin().context("no stdin")?;
    running.wait_for_stdout("ready")?;
    ensure!(origin(containerd, from, run.container())? == "clone", "no clone");
    let inventory = containerd.inventory()?;
    let qemu = inventory
        .processes
        .iter()
        .find(|process| process.command.contains("microvm") && process.command.contains(run.container()));
    let qemu = qemu.with_context(|| format!("no QEMU in\n{inventory}"))?.pid;
    let before = own_kib(qemu)?;
    stdin.write_all(b"\n")?;
    running.wait_for_stdout("touched")?;
    let touched = own_kib(qemu)?;
    ensure!(touched > before + TOUCHED_KIB * 9 / 10, "{before} KiB before and {touched} KiB with the file");
    stdin.write_all(b"\n")?;
    running.wait_for_stdout("freed")?;
    // The end of memory has no event.
    let end = Instant::now() + RETURN_DEADLINE;
    // The guest frees ranges of 2 MiB: a single page in use keeps a range. 12 to 15 % were kept in quiet
    // runs.
    let low = before + TOUCHED_KIB / 3;
    let mut now = touched;
    while now > low {
        ensure!(
            Instant::now() < end,
            "{before} KiB before, {touched} KiB with the file, {now} KiB without it"
        );
        #[expect(clippy::disallowed_methods, reason = "memory that is given back is no event for others")]
        thread::sleep(Duration::from_millis(100));
        now = own_kib(qemu)?;
    }
    stdin.write_all(b"\n")?;
    drop(stdin);
    // The clone still reads the pages that it shares with the template.
    let output = running.wait()?.ok()?;
    ensure!(output.text().contains("/bin/busybox"), "{output}");
    // A process that reads a hole of the template adds a page of zeros, which does no harm.
    let now = memory.metadata()?.blocks();
    ensure!(now >= allocated, "the template has lost memory: {now} blocks of {allocated}");
    let verified = templates.command(&["verify"])?.ok()?;
    ensure!(verified.text().trim_end().ends_with(" ok"), "{verified}");
    templates.remove_all()
}

fn growth_goes_with_the_last_clone(containerd: &mut Containerd) -> Result<()> {
    let (templates, template) = with_template(containerd)?;
    let memory = || fs::metadata(format!("/proc/{}/fd/3", template.holder));
    let blocks = || -> Result<u64> { Ok(memory()?.blocks()) };
    let file = memory()?.ino();
    let built = blocks()?;
    let (large, little) = (Bundle::busybox(containerd)?, Bundle::busybox(containerd)?);
    // The template does not have this memory.
    let script = "dd if=/dev/zero of=/scratch/file bs=1M count=250 2>/dev/null; echo touched; read go";
    let config = large.config(&["sh", "-c", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/scratch", "tmpfs", "tmpfs", &["size=300m"]));
    })?;
    let big = containerd.run_spec(&config).with_stdin();
    let small =
        containerd.run_spec(&little.config(&["sh", "-c", "echo ready; read go"], |_| ())?).with_stdin();
    // As long as the memory that is touched may take on a busy machine.
    let mut small = small.spawn(DEADLINE + RETURN_DEADLINE)?;
    small.wait_for_stdout("ready")?;
    let mut big = big.spawn(DEADLINE + RETURN_DEADLINE)?;
    big.wait_for_stdout("touched")?;
    let grown = blocks()?;
    ensure!(grown > 2 * built, "{built} blocks before, {grown} with 250 MiB in use");
    drop(big.stdin());
    big.wait()?;
    // The other clone may use the pages that have been added. Their number proves nothing: the host's kernel may drop
    // pages of zeros that were never written (shmem_recalc_inode in mm/shmem.c).
    ensure!(memory()?.ino() == file, "the memory of a template in use was replaced");
    drop(small.stdin());
    small.wait()?;
    let end = Instant::now() + DEADLINE;
    while blocks()? > 2 * built {
        ensure!(Instant::now() < end, "{built} blocks before, {} without any clone", blocks()?);
        #[expect(clippy::disallowed_methods, reason = "memory that is given back is no event for others")]
        thread::sleep(Duration::from_millis(20));
    }
    let verified = templates.command(&["verify"])?.ok()?;
    ensure!(verified.text().trim_end().ends_with(" ok"), "{verified}");
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

/// Where clones load the state of their template, the first one records what it has written to, and the next ones have these pages.
fn memory_is_copied_ahead(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let setup = Setup::new().templates(&templates.dir, "use").set("template", "twins", Value::flag(false));
    containerd.configure(&setup)?;
    templates.build()?;
    let records = || -> Result<Vec<PathBuf>> {
        let paths = fs::read_dir(&templates.dir)?.map(|entry| Ok(entry?.path()));
        let paths = paths.collect::<Result<Vec<_>>>()?;
        Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|kind| kind == "pages")).collect())
    };
    let from = containerd.log().position();
    runs_from(containerd, "clone")?;
    let [record] = &records()?[..] else { bail!("not one record of what clones write to") };
    ensure!(lines_with(containerd, from, &["memory was copied ahead"]) == 0, "before anything was recorded");
    for _ in 0..2 {
        runs_from(containerd, "clone")?;
    }
    let copied = lines_with(containerd, from, &["memory was copied ahead", "pages="]);
    ensure!(copied == 2, "memory was copied for {copied} of 2 clones");
    // Whatever is in the record, clones start.
    for damaged in ["[", r#"[{"first":4503599627370496,"count":3},{"first":0,"count":9}]"#] {
        fs::write(record, damaged)?;
        runs_from(containerd, "clone")?;
    }
    let verified = templates.command(&["verify"])?.ok()?;
    ensure!(verified.text().trim_end().ends_with(" ok"), "{verified}");
    templates.remove_all()?;
    ensure!(records()?.is_empty(), "the record is left");
    Ok(())
}

/// Private memory of the guest: neither the template's, nor what QEMU itself needs, such as the code that it
/// has translated.
fn own_kib(pid: u32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut of_guest = false;
    let mut kib = None;
    // proc_pid_smaps(5): a line with the addresses and the file, then "Name: VALUE".
    for line in maps.lines() {
        match line.split_once(' ') {
            Some(("Anonymous:", value)) if of_guest => {
                let value: u64 = value.trim().trim_end_matches(" kB").parse()?;
                kib = Some(kib.unwrap_or(0) + value);
            }
            Some((name, rest)) if !name.ends_with(':') => of_guest = rest.contains("/memfd:"),
            _ => {}
        }
    }
    kib.with_context(|| format!("no memory of a guest in\n{maps}"))
}
