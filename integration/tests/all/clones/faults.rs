//! A template that cannot be built or used costs a start the time of a boot, never more.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    process::wait_for_end,
    setup::{Setup, Value},
    templates::Templates,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{automatic, lines_with, runs_from, with_template};
use crate::{
    harness::{IMAGE, fails_saying, on_newest_containerd, works},
    host_trouble::{find, script},
};

on_newest_containerd!(
    holder_killed,
    builder_killed,
    manifest_damaged,
    directory_of_others,
    qemu_upgraded,
    budget_too_small,
    state_that_qemu_refuses,
    clones_that_are_lost,
    a_clone_whose_qemu_is_killed,
    no_memory_for_a_vm,
    memory_for_some_only,
);

/// Longest that a killed process may take to end.
const END: Duration = Duration::from_secs(10);

fn manifest(templates: &Templates<'_>, key: &str) -> PathBuf {
    templates.dir.join(key).with_extension("json")
}

fn holder_killed(containerd: &mut Containerd) -> Result<()> {
    let templates = automatic(containerd)?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    let old = templates.only()?;
    kill(Pid::from_raw(i32::try_from(old.holder)?), Signal::SIGKILL)?;
    ensure!(wait_for_end(old.holder, END)?, "the holder does not end");
    // Manifest and lock still exist, and are ignored.
    ensure!(
        manifest(&templates, &old.key).exists() && templates.list()?[0].state == "gone",
        "the remains of the template"
    );
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    let new = templates.only()?;
    ensure!(new.key == old.key && new.holder != old.holder, "{old:?} and {new:?}");
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

fn builder_killed(containerd: &mut Containerd) -> Result<()> {
    let templates = automatic(containerd)?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("vm")?;
    let builder = find(containerd, &["template-builder"])?;
    kill(builder, Signal::SIGKILL)?;
    ensure!(wait_for_end(builder.as_raw().cast_unsigned(), END)?, "the builder does not end");
    let half = fs::read_dir(&templates.dir)?
        .flatten()
        .any(|entry| entry.path().extension().is_some_and(|is| is == "vm"));
    ensure!(half && watch.count("json")? == 0, "the builder was not killed half-way: {watch:?}");
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

fn manifest_damaged(containerd: &mut Containerd) -> Result<()> {
    let (templates, template) = with_template(containerd)?;
    let path = manifest(&templates, &template.key);
    let text = fs::read_to_string(&path)?;
    let manifest: serde_json::Value = serde_json::from_str(&text)?;
    let version = format!("\"version\": {}", manifest["version"]);
    let other_version = text.replacen(&version, "\"version\": 99", 1);
    ensure!(other_version != text, "no version in {text}");
    let other_digest = {
        let (head, tail) = text.split_once("\"sha256\": \"").context("no digest")?;
        let digit = if tail.starts_with('0') { '1' } else { '0' };
        format!("{head}\"sha256\": \"{digit}{}", &tail[1..])
    };
    // Only a check detects that the template's content differs from its manifest.
    fs::write(&path, other_digest)?;
    let verified = templates.command(&["verify"])?;
    ensure!(verified.status == 1 && verified.text().trim_end().ends_with(" changed"), "{verified}");
    fs::write(&path, &text)?;
    runs_from(containerd, "clone")?;
    let other_form = format!("{{ {version}, \"rest\": {text} }}");
    for damaged in [&text[..text.len() / 2], "", "\u{7f}ELF", &other_version, &other_form] {
        fs::write(&path, damaged)?;
        // In the mode "use", the damaged manifest is left alone.
        runs_from(containerd, "boot")?;
        templates.command(&["ls"])?.ok()?;
    }
    // In the mode "auto", it is replaced by another template, and the holder of the old one ends.
    containerd.configure(&Setup::new().templates(&templates.dir, "auto"))?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    let new = templates.only()?;
    ensure!(new.key == template.key && new.holder != template.holder, "{template:?} and {new:?}");
    ensure!(wait_for_end(template.holder, END)?, "the old holder lives");
    runs_from(containerd, "clone")?;
    // A template with a damaged manifest can be removed.
    fs::write(&path, "")?;
    templates.command(&["rm", "--all"])?.ok()?;
    ensure!(wait_for_end(new.holder, END)?, "a holder whose manifest is damaged is not removed");
    templates.remove_all()
}

fn directory_of_others(containerd: &mut Containerd) -> Result<()> {
    let (templates, template) = with_template(containerd)?;
    let mode = |mode| fs::set_permissions(&templates.dir, fs::Permissions::from_mode(mode));
    for open in [0o777, 0o750, 0o701] {
        mode(open)?;
        let from = containerd.log().position();
        runs_from(containerd, "boot")?;
        let dir = templates.dir.display().to_string();
        let lines = lines_with(containerd, from, &["so templates in it cannot be trusted", &dir]);
        ensure!(lines == 1, "{lines} lines report that {dir} has mode {open:o}");
    }
    mode(0o700)?;
    runs_from(containerd, "clone")?;
    ensure!(templates.only()? == template, "another template");
    templates.remove_all()
}

/// The system's QEMU, run by a script that can run a command before.
fn wrapped(containerd: &Containerd, name: &str, before: &str) -> Result<PathBuf> {
    script(containerd, name, &format!("{before}\nexec qemu-system-x86_64 \"$@\""))
}

fn with_qemu(templates: &Templates<'_>, mode: &str, qemu: &Path) -> Setup {
    let systems = ["/usr/bin/qemu-system-x86_64", "/usr/share/qemu"].map(Path::new);
    let setup = Setup::new().templates(&templates.dir, mode).set("vm", "qemu", Value::path(qemu));
    setup.set("vm", "qemu_files", Value::paths(&systems))
}

fn qemu_upgraded(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let qemu = wrapped(containerd, "qemu", ": old")?;
    containerd.configure(&with_qemu(&templates, "auto", &qemu))?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    let old = templates.only()?;
    runs_from(containerd, "clone")?;
    // Like an upgrade by a package manager: a new file takes the old one's name.
    let new = wrapped(containerd, "qemu.new", ": new")?;
    fs::rename(new, &qemu)?;
    ensure!(templates.list()?[0].state == "outdated", "the new QEMU was not noticed");
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    let new = templates.only()?;
    ensure!(new.key != old.key, "the template of another QEMU has the same key");
    ensure!(wait_for_end(old.holder, END)?, "the outdated template lives");
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

fn budget_too_small(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let setup = Setup::new().templates(&templates.dir, "auto");
    containerd.configure(&setup.clone().set("template", "budget_mib", Value::number(1)))?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("failed")?;
    templates.quiet()?;
    for _ in 0..2 {
        let from = containerd.log().position();
        runs_from(containerd, "boot")?;
        let lines =
            lines_with(containerd, from, &["booting a VM", "does not fit into template.budget_mib = 1"]);
        ensure!(lines == 1, "{lines} lines report why there is no template");
    }
    templates.quiet()?;
    ensure!(watch.count("vm")? == 1 && watch.count("json")? == 0, "the build was tried again: {watch:?}");
    // A manual build is tried again, with the present configuration.
    containerd.configure(&setup)?;
    templates.build()?;
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

fn state_that_qemu_refuses(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let refuses = "case \"$*\" in *-incoming*) echo 'qemu: cannot load that' >&2; exit 1 ;; esac";
    let qemu = wrapped(containerd, "qemu-refuses", refuses)?;
    containerd.configure(&with_qemu(&templates, "use", &qemu))?;
    let template = templates.build()?;
    for _ in 0..3 {
        let from = containerd.log().position();
        runs_from(containerd, "boot")?;
        let lines = lines_with(containerd, from, &["a clone was lost, booting instead", "cannot load that"]);
        ensure!(lines == 1, "{lines} lines report that the template could not be cloned");
    }
    // No clone is tried after that.
    ensure!(wait_for_end(template.holder, END)?, "the template lives");
    let from = containerd.log().position();
    runs_from(containerd, "boot")?;
    let lines = lines_with(containerd, from, &["booting a VM", "no template", "cannot load that"]);
    ensure!(lines == 1, "{lines} lines report why there is no template");
    templates.remove_all()
}

/// The guest of a clone does not answer, because the channel of its QEMU leads elsewhere.
fn clones_that_are_lost(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let dir = containerd.root().join("switch");
    fs::create_dir(&dir)?;
    let switch = dir.join("lose");
    let lose = format!("case \"$*\" in *-incoming*) ! [ -e {} ] || exec 7<&4 ;; esac", switch.display());
    let qemu = wrapped(containerd, "qemu-loses", &lose)?;
    let systems = ["/usr/bin/qemu-system-x86_64", "/usr/share/qemu"].map(Path::new);
    let setup = with_qemu(&templates, "use", &qemu).set("vm", "channel", Value::text("serial"));
    containerd.configure(&setup.set("vm", "qemu_files", Value::paths(&[systems[0], systems[1], &dir])))?;
    let template = templates.build()?;
    let booted_instead = || -> Result<usize> {
        let from = containerd.log().position();
        runs_from(containerd, "boot")?;
        let lines = lines_with(containerd, from, &["a clone was lost, booting instead"]);
        ensure!(lines == 1, "{lines} lines report a lost clone");
        Ok(lines_with(containerd, from, &["the template is put aside"]))
    };
    fs::write(&switch, "")?;
    ensure!(booted_instead()? == 0, "one lost clone condemns its template");
    fs::remove_file(&switch)?;
    runs_from(containerd, "clone")?;
    // The clone that worked counts: three more have to be lost.
    fs::write(&switch, "")?;
    ensure!(booted_instead()? + booted_instead()? == 0, "the template was put aside too early");
    ensure!(booted_instead()? == 1, "the template of three lost clones is tried on");
    ensure!(wait_for_end(template.holder, END)?, "the template lives");
    fs::remove_file(&switch)?;
    let from = containerd.log().position();
    runs_from(containerd, "boot")?;
    let lines = lines_with(containerd, from, &["booting a VM", "no template"]);
    ensure!(lines == 1, "{lines} lines report why there is no template");
    templates.remove_all()
}

/// The QEMU of a clone is killed, as by the OOM killer: no fault of its template, which serves the next container.
fn a_clone_whose_qemu_is_killed(containerd: &mut Containerd) -> Result<()> {
    let templates = Templates::new(containerd)?;
    let dir = containerd.root().join("switch");
    fs::create_dir(&dir)?;
    let switch = dir.join("kill");
    // The first process of a PID namespace cannot kill itself: the kernel does, at the limit of its processor time.
    let kill = "{ ulimit -t 1; while :; do :; done; }";
    let kill = format!("case \"$*\" in *-incoming*) ! [ -e {} ] || {kill} ;; esac", switch.display());
    let qemu = wrapped(containerd, "qemu-killed", &kill)?;
    let systems = ["/usr/bin/qemu-system-x86_64", "/usr/share/qemu"].map(Path::new);
    let setup = with_qemu(&templates, "use", &qemu);
    containerd.configure(&setup.set("vm", "qemu_files", Value::paths(&[systems[0], systems[1], &dir])))?;
    templates.build()?;
    fs::write(&switch, "")?;
    let from = containerd.log().position();
    runs_from(containerd, "boot")?;
    let lines = lines_with(containerd, from, &["a clone was lost, booting instead", "SIGKILL"]);
    ensure!(lines == 1, "{lines} lines report a lost clone");
    fs::remove_file(&switch)?;
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

/// The error when the host has not enough memory for a VM.
const NO_MEMORY: [&str; 2] = ["not enough memory on this host", "vm.memory_reserve_percent"];

fn no_memory_for_a_vm(containerd: &mut Containerd) -> Result<()> {
    let (templates, _) = with_template(containerd)?;
    let setup = Setup::new().templates(&templates.dir, "use");
    for mode in ["use", "off"] {
        let setup = setup.clone().templates(&templates.dir, mode);
        containerd.configure(&setup.set("vm", "memory_reserve_percent", Value::number(100)))?;
        fails_saying(containerd, &containerd.run(IMAGE, &["true"]), &NO_MEMORY)?;
    }
    containerd.configure(&setup)?;
    runs_from(containerd, "clone")?;
    templates.remove_all()
}

/// The highest memory requirement of a start by its own account, MiB; the host's available memory changes
/// while the test runs.
const SOME: u64 = 450;

fn memory_for_some_only(containerd: &mut Containerd) -> Result<()> {
    let setup = Setup::new().set("template", "mode", Value::text("off"));
    let before = containerd.inventory()?;
    // Other processes on this machine start and end, so that all or none of the starts may fit.
    for _ in 0..5 {
        let (total, available) = host_memory_mib()?;
        let reserve = available.saturating_sub(SOME) * 100 / total;
        containerd.configure(&setup.clone().set("vm", "memory_reserve_percent", Value::number(reserve)))?;
        let runs: Vec<_> = (0..8).map(|_| containerd.run(IMAGE, &["echo", "well"])).collect();
        let outputs = thread::scope(|scope| -> Result<Vec<_>> {
            let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.output())).collect();
            started.into_iter().map(|run| run.join().expect("no panic")).collect()
        })?;
        containerd.settle(&before)?;
        let (worked, refused): (Vec<_>, Vec<_>) = outputs.into_iter().partition(|output| output.status == 0);
        for output in &refused {
            let printed = output.error_text();
            ensure!(NO_MEMORY.iter().all(|word| printed.contains(word)), "not refused but: {output}");
        }
        ensure!(worked.iter().all(|output| output.text() == "well\n"), "{worked:?}");
        if !worked.is_empty() && !refused.is_empty() {
            containerd.configure(&Setup::new())?;
            return works(containerd);
        }
    }
    anyhow::bail!("never were some refused and others not")
}

/// Total and available.
fn host_memory_mib() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).context("odd /proc/meminfo")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? >> 10)
    };
    Ok((field("MemTotal:")?, field("MemAvailable:")?))
}
