//! The automatic actions of `template.mode = "auto"`, the default.

use std::{io::Write as _, thread};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, inventory::Process, process::DEADLINE};

use super::{automatic, has_id, origin, runs_from};
use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(
    the_second_start_is_a_clone,
    concurrent_starts_build_one_template,
    clones_outlive_their_template
);

fn the_second_start_is_a_clone(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let templates = automatic(containerd)?;
    let mut watch = templates.watch()?;
    runs_from(containerd, "boot")?;
    watch.wait_for("json")?;
    templates.only()?;
    runs_from(containerd, "clone")?;
    runs_from(containerd, "clone")?;
    ensure!(watch.count("vm")? == 1, "not one template was built: {watch:?}");
    templates.remove_all()?;
    containerd.settle(&before)
}

fn concurrent_starts_build_one_template(containerd: &mut Containerd) -> Result<()> {
    let templates = automatic(containerd)?;
    let mut watch = templates.watch()?;
    let before = containerd.inventory()?;
    let from = containerd.log().position();
    let runs: Vec<_> = (0..8).map(|_| containerd.run(IMAGE, &["echo", "well"])).collect();
    thread::scope(|scope| {
        let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.ok())).collect();
        started.into_iter().try_for_each(|run| {
            let printed = run.join().map_err(|_| anyhow::anyhow!("a start panicked"))??;
            ensure!(printed == "well\n", "a container did not work: {printed}");
            Ok(())
        })
    })?;
    watch.wait_for("json")?;
    templates.quiet()?;
    ensure!(watch.count("vm")? == 1 && watch.count("json")? == 1, "not one was built: {watch:?}");
    for run in &runs {
        origin(containerd, from, run.container())?;
    }
    // Of the eight containers and the builders, only the holder is left, with the template's QEMU.
    let holder = templates.only()?.holder;
    let mut with_holder = before.clone();
    let processes = containerd.inventory()?.processes;
    let kept = |process: &Process| [process.pid, process.parent].contains(&holder);
    with_holder.processes.extend(processes.into_iter().filter(kept));
    containerd.settle(&with_holder)?;
    runs_from(containerd, "clone")?;
    templates.remove_all()?;
    containerd.settle(&before)
}

fn clones_outlive_their_template(containerd: &mut Containerd) -> Result<()> {
    let (templates, _) = super::with_template(containerd)?;
    let from = containerd.log().position();
    let run = containerd.run(IMAGE, &["sh", "-c", "echo ready; read word; echo $word; cat /etc/passwd"]);
    let mut running = run.clone().with_stdin().spawn(DEADLINE)?;
    running.wait_for_stdout("ready")?;
    ensure!(origin(containerd, from, run.container())? == "clone", "no clone");
    templates.remove_all()?;
    let mut stdin = running.stdin().context("no stdin")?;
    stdin.write_all(b"on\n")?;
    drop(stdin);
    let output = running.wait()?.ok()?;
    // The clone reads what it has not touched before: files, and the pages of the programs that read them.
    ensure!(output.text().starts_with("ready\non\nroot:"), "{output}");
    // In the mode "use", no template is built.
    runs_from(containerd, "boot")?;
    ensure!(templates.list()?.is_empty(), "a template was built");
    Ok(())
}

#[test]
fn ids_are_found_in_lines() {
    assert!(has_id(r#"container created id="c1" pid=4"#, "c1"));
    assert!(has_id(r#"msg="created id=\"c1\" pid=4""#, "c1"));
    assert!(!has_id(r#"container created id="c12" pid=4"#, "c1") && !has_id("pid=4", "c1"));
}
