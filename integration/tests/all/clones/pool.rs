//! Clones that are ready before a container is requested.

use std::{fs, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    inventory,
    process::{DEADLINE, Invocation, wait_for_end},
    runtime::Runtime,
    setup::{Setup, Value},
    templates::{Templates, Watch},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value as Json, json};

use super::{disks::has_disks_of_template, origin, runs_from, twins::have_nothing_in_common, works_from};
use crate::{
    fork::eventually,
    harness::{IMAGE, on_newest_containerd},
    host_cgroup::is_confined,
    stdin::input_of_any_size,
};

on_newest_containerd!(
    ready_clones_are_taken_and_replaced,
    clones_are_in_their_containers_cgroup,
    members_that_do_not_fit_are_given_up,
    members_that_are_lost,
    a_drain_ends_members_however_far_they_have_come,
    a_drain_while_members_are_taken,
    members_end_some_time_after_their_containerd,
    no_member_where_memory_is_not_to_spare,
    members_give_way_to_a_vm_without_memory,
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
        Self::configured(containerd, Setup::new())
    }

    fn configured(containerd: &'a Containerd, setup: Setup) -> Result<Self> {
        let templates = Templates::new(containerd)?;
        let dir = containerd.root().join("pool");
        let setup = setup
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
        Watch::of(&pool.path())?
            .wait_until(|| Ok(self.states()?.iter().filter(|it| *it == "ready").count() == SIZE))
    }

    /// The states of the members.
    fn states(&self) -> Result<Vec<String>> {
        let members = self.command("ls")?;
        let state = |member: &Json| member["state"].as_str().unwrap_or_default().to_owned();
        Ok(members.as_array().context("no list")?.iter().map(state).collect())
    }

    /// Processes of members and of their VMs.
    fn processes(&self) -> Result<Vec<u32>> {
        let all = self.containerd.inventory()?.processes;
        let holders = all.iter().filter(|process| process.command.contains("template-holder"));
        let holders: Vec<_> = holders.map(|process| process.pid).collect();
        // The QEMU of a template is a child of the template's holder.
        let theirs = |process: &&inventory::Process| {
            let named = ["pool-member", "qemu"].iter().any(|word| process.command.contains(word));
            named && !holders.contains(&process.parent)
        };
        Ok(all.iter().filter(theirs).map(|process| process.pid).collect())
    }

    fn end(self) -> Result<()> {
        self.command("drain")?;
        ensure!(self.command("ls")? == json!([]), "the pool is not empty");
        // A process ends a little later than its member, when the kernel has removed the VM's tap device.
        eventually("the processes of the pool have ended", || Ok(self.processes()?.is_empty()))?;
        self.templates.remove_all()?;
        Ok(fs::remove_dir_all(&self.dir)?)
    }
}

fn ready_clones_are_taken_and_replaced(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    // Members that have waited for some time differ as other clones do, and their clocks are as exact.
    have_nothing_in_common(containerd, SIZE, "ready")?;
    pool.full()?;
    has_disks_of_template(containerd, "ready", 2)?;
    pool.full()?;
    // There are more starts than members.
    let from = containerd.log().position();
    let runs: Vec<_> = (0..2 * SIZE).map(|_| containerd.run(IMAGE, &["echo", "well"])).collect();
    thread::scope(|scope| {
        let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.ok())).collect();
        started.into_iter().try_for_each(|run| {
            let printed = run.join().expect("no panic")?;
            ensure!(printed == "well\n", "a container did not work: {printed}");
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

/// Clones of either kind, and the members that their starts request, which outlive them.
fn clones_are_in_their_containers_cgroup(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    for wanted in ["clone", "ready"] {
        let from = containerd.log().position();
        let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
        run.ok()?;
        let origin = origin(containerd, from, run.container())?;
        ensure!(origin == wanted, "the VM of {} is no {wanted} but a {origin}", run.container());
        pool.full()?;
        is_confined(containerd, run.container())?;
        containerd.task(run.container()).kill()?;
        containerd.task(run.container()).delete(137)?;
    }
    pool.end()?;
    containerd.settle(&before)
}

fn members_that_do_not_fit_are_given_up(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    let other = ["--annotation", "io.machinen.memory-ceiling=300"];
    works_from(containerd, &containerd.run(IMAGE, &["echo", "well"]).flags(&other), "boot")?;
    input_of_any_size(containerd)?;
    runs_from(containerd, "ready")?;
    pool.full()?;
    // A container that fails takes its clone with it, and nothing else.
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
    // Each time, one half of a member is killed: the VM, or the process that owns it.
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
    // After a change of the configuration file, the members do not fit.
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

fn a_drain_ends_members_however_far_they_have_come(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    for state in ["starting", "cloning", "warming up", "ready"] {
        runs_from(containerd, "clone")?;
        // A member that has gone further by then is accepted: the caller cannot choose the moment of a drain.
        let reached =
            ["starting", "cloning", "warming up", "ready"].into_iter().skip_while(|it| *it != state);
        let reached: Vec<_> = reached.collect();
        // The shim starts one member after the other, and a drain ends those that it finds.
        eventually(state, || {
            let states = pool.states()?;
            Ok(states.len() == SIZE && states.iter().any(|is| reached.contains(&is.as_str())))
        })?;
        let had = pool.states()?;
        let drained = pool.command("drain")?;
        ensure!(drained["ended"].as_u64() >= Some(1), "{drained} of {had:?}");
        // A member releases its slot, which a drain waits for, right before its process ends.
        eventually(&format!("the end of {had:?}"), || Ok(pool.processes()?.is_empty()))?;
        ensure!(pool.states()?.is_empty(), "{:?}", pool.states()?);
    }
    // The pool can be used again at once.
    runs_from(containerd, "clone")?;
    pool.full()?;
    listed(&pool)?;
    runs_from(containerd, "ready")?;
    pool.full()?;
    pool.end()?;
    containerd.settle(&before)
}

/// The members in the output for programs and for users.
fn listed(pool: &Pool<'_>) -> Result<()> {
    let members = pool.command("ls")?;
    for member in members.as_array().context("no list")? {
        let number = |name: &str| member[name].as_u64().unwrap_or_default();
        ensure!(number("pid") > 1 && number("memoryMib") >= 128 && number("vcpus") >= 1, "{member}");
        // An idle VM takes some memory, and far less than its limit.
        ensure!((10 << 20..400 << 20).contains(&number("takes")), "{member}");
        ensure!(number("created") > 1_700_000_000, "{member}");
    }
    let table = pool.containerd.machinen(&["pool", "ls"])?.run()?.ok()?.text();
    let lines: Vec<_> = table.lines().collect();
    ensure!(lines.len() == SIZE + 1 && lines[0].contains("PID") && lines[1].ends_with("ready"), "{table}");
    Ok(())
}

/// Either order is correct: a container gets a member or starts a VM of its own, and a member that was taken
/// is not ended.
fn a_drain_while_members_are_taken(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    for _ in 0..3 {
        let runs: Vec<_> =
            (0..SIZE).map(|_| containerd.run(IMAGE, &["sh", "-c", "sleep 1; echo well"])).collect();
        thread::scope(|scope| {
            let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.ok())).collect();
            for _ in 0..5 {
                pool.command("drain")?;
            }
            started.into_iter().try_for_each(|run| {
                let printed = run.join().expect("no panic")?;
                ensure!(printed == "well\n", "a container did not work: {printed}");
                Ok(())
            })
        })?;
        pool.full()?;
    }
    pool.end()?;
    containerd.settle(&before)
}

fn members_end_some_time_after_their_containerd(containerd: &mut Containerd) -> Result<()> {
    const AFTER: Duration = Duration::from_secs(5);
    let before = containerd.inventory()?;
    let setup = Setup::new().set("pool", "containerd_timeout_s", Value::number(AFTER.as_secs()));
    let pool = Pool::configured(containerd, setup)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    let members = pool.processes()?;
    ensure!(members.len() == 2 * SIZE, "{members:?}");
    let Pool { templates, dir, .. } = pool;
    let templates = templates.dir;
    containerd.restart()?;
    for pid in &members {
        ensure!(!wait_for_end(*pid, AFTER / 2)?, "a restart of containerd has ended {pid}");
    }
    runs_from(containerd, "ready")?;
    containerd.stop()?;
    for pid in containerd.inventory()?.processes.iter().filter(|it| it.command.contains("pool-member")) {
        ensure!(wait_for_end(pid.pid, DEADLINE)?, "{pid:?} waits for a containerd that has gone");
    }
    containerd.restart()?;
    let output = containerd.machinen(&["pool", "ls", "--json"])?.run()?.ok()?;
    ensure!(output.text().trim() == "[]", "{output}");
    containerd.machinen(&["template", "rm", "--all"])?.run()?.ok()?;
    fs::remove_dir_all(&templates)?;
    fs::remove_dir_all(&dir)?;
    containerd.settle(&before)
}

fn no_member_where_memory_is_not_to_spare(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let setup = Setup::new().set("pool", "memory_reserve_percent", Value::number(100));
    let pool = Pool::configured(containerd, setup)?;
    let from = containerd.log().position();
    runs_from(containerd, "clone")?;
    runs_from(containerd, "clone")?;
    ensure!(pool.command("ls")? == json!([]), "a clone waits");
    let lines = containerd.log().since(from);
    ensure!(lines.iter().any(|line| line.contains("no clone is kept ready")), "no reason is logged");
    let trouble = |line: &&String| line.contains("level=warn") && line.contains("pool");
    ensure!(!lines.iter().any(|line| trouble(&line)), "it is no trouble: {lines:?}");
    pool.templates.remove_all()?;
    containerd.settle(&before)
}

/// Another machinen on the same host, with a configuration by which no memory is left for a VM.
fn members_give_way_to_a_vm_without_memory(containerd: &mut Containerd) -> Result<()> {
    let before = containerd.inventory()?;
    let pool = Pool::new(containerd)?;
    runs_from(containerd, "clone")?;
    pool.full()?;
    let bundle = Bundle::busybox_in(containerd.root().join("bundle"))?;
    bundle.config(&["true"], |_| {})?;
    let full = Setup::new().set("pool", "dir", Value::path(&pool.dir));
    let full = full.set("vm", "memory_reserve_percent", Value::number(100));
    let program = Runtime::Machinen.program(bundle.dir(), &full)?;
    let run = Invocation::new(program).arg("--root").arg(bundle.dir().join("state"));
    let refused = run.args(["run", "--bundle"]).arg(bundle.dir()).arg("c").run()?;
    ensure!(
        refused.status != 0 && refused.error_text().contains("not enough memory on this host"),
        "{refused}"
    );
    ensure!(pool.command("ls")? == json!([]), "the pool keeps its memory");
    runs_from(containerd, "clone")?;
    fs::remove_dir_all(bundle.dir())?;
    pool.end()?;
    containerd.settle(&before)
}
