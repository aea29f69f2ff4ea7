//! Clones that are ready before anyone asks for a container.

use std::{fs, path::PathBuf, thread};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    process::{DEADLINE, wait_for_end},
    setup::{Setup, Value},
    templates::{Templates, Watch},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value as Json, json};

use super::{origin, runs_from, twins::have_nothing_in_common, works_from};
use crate::{
    harness::{IMAGE, on_newest_containerd},
    stdin::input_of_any_size,
};

on_newest_containerd!(
    ready_clones_are_taken_and_replaced,
    what_does_not_fit_is_given_up,
    members_that_are_lost
);

const SIZE: usize = 3;

/// The warm pool of a containerd's own.
struct Pool<'a> {
    containerd: &'a Containerd,
    templates: Templates<'a>,
    dir: PathBuf,
}

impl<'a> Pool<'a> {
    fn new(containerd: &'a Containerd) -> Result<Self> {
        let templates = Templates::new(containerd)?;
        let dir = containerd.root().join("pool");
        let setup = Setup::new()
            .templates(&templates.dir, "use")
            .set("pool", "size", Value::number(SIZE as u64))
            .set("pool", "dir", Value::path(&dir));
        containerd.configure(&setup)?;
        templates.build()?;
        Ok(Self { containerd, templates, dir })
    }

    fn command(&self, verb: &str) -> Result<Json> {
        let output = self.containerd.machinen(&["pool", verb, "--json"])?.run()?.ok()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("odd answer: {output}"))
    }

    /// Waits until all places are taken again.
    fn full(&self) -> Result<()> {
        let pools: Vec<_> = fs::read_dir(&self.dir)?.collect::<Result<_, _>>()?;
        let [pool] = &pools[..] else { anyhow::bail!("not one pool: {pools:?}") };
        Watch::of(&pool.path())?.wait_until(|| {
            let members = self.command("ls")?;
            Ok(members.as_array().is_some_and(|members| members.len() == SIZE))
        })
    }

    fn end(self) -> Result<()> {
        self.command("drain")?;
        ensure!(self.command("ls")? == json!([]), "the pool is not empty");
        for process in self.containerd.inventory()?.processes {
            ensure!(!process.command.contains("qemu"), "{process:?} has outlived the pool");
        }
        self.templates.remove_all()?;
        Ok(fs::remove_dir_all(&self.dir)?)
    }
}

fn ready_clones_are_taken_and_replaced(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    // They have waited for some time and are as different, and their clocks as right, as any.
    have_nothing_in_common(containerd, SIZE, "ready")?;
    pool.full()?;
    // More than there are.
    let from = containerd.log().position();
    let runs: Vec<_> = (0..2 * SIZE).map(|_| containerd.run(IMAGE, &["echo", "well"])).collect();
    thread::scope(|scope| {
        let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.ok())).collect();
        started.into_iter().try_for_each(|run| {
            let said = run.join().expect("no panic")?;
            ensure!(said == "well\n", "a container did not work: {said}");
            Ok(())
        })
    })?;
    let origins: Result<Vec<_>> = runs.iter().map(|run| origin(containerd, from, run.container())).collect();
    let origins = origins?;
    ensure!(origins.iter().filter(|origin| *origin == "ready").count() >= SIZE, "{origins:?}");
    ensure!(origins.iter().all(|origin| origin == "ready" || origin == "clone"), "{origins:?}");
    pool.full()?;
    pool.end()?;
    containerd.settle(&before)
}

fn what_does_not_fit_is_given_up(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    let other = ["--annotation", "io.machinen.memory-ceiling=300"];
    works_from(containerd, &containerd.run(IMAGE, &["echo", "well"]).flags(&other), "boot")?;
    input_of_any_size(containerd)?;
    runs_from(containerd, "ready")?;
    pool.full()?;
    // What is wrong with a container takes its clone with it, and nothing else.
    let nothing = containerd.run(IMAGE, &["no-such-command"]).output()?;
    ensure!(nothing.status != 0 && nothing.error_text().contains("no-such-command"), "{nothing}");
    runs_from(containerd, "ready")?;
    pool.full()?;
    pool.end()?;
    containerd.settle(&before)
}

fn members_that_are_lost(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    // One half of a member each: the VM, and the process that owns it.
    let processes = containerd.inventory()?.processes;
    for word in ["qemu", "pool-member"] {
        let process =
            processes.iter().rfind(|process| process.command.contains(word)).context("no member")?;
        kill(Pid::from_raw(i32::try_from(process.pid)?), Signal::SIGKILL)?;
    }
    for _ in 0..=SIZE {
        let output = containerd.run(IMAGE, &["echo", "well"]).output()?.ok()?;
        ensure!(output.text() == "well\n", "{output}");
    }
    pool.full()?;
    // Another configuration, by a change of the file, has no use for them.
    let watched = containerd.inventory()?.processes;
    containerd.configure(&Setup::new().templates(&pool.templates.dir, "use"))?;
    for process in watched.iter().filter(|process| process.command.contains("pool-member")) {
        ensure!(wait_for_end(process.pid, DEADLINE)?, "{process:?} waits on");
    }
    runs_from(containerd, "clone")?;
    pool.templates.remove_all()?;
    fs::remove_dir_all(&pool.dir)?;
    containerd.settle(&before)
}
