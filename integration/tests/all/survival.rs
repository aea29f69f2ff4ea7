//! After a component is killed or hangs, nothing is left, and the next try works.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    ctr::Run,
    fake::{Behaviour, FakeVmm},
    setup::Value,
    shim::{Client, Shim, V3},
};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use ttrpc::Code;

use crate::{
    fork::eventually,
    harness::{on_every_containerd, on_newest_containerd},
};

on_every_containerd!(killed_at_each_step, agent_killed);
on_newest_containerd!(agent_hangs, twenty_at_once, twenty_vms_at_once, two_hundred_lives_in_one_shim);

/// Deadline of requests that need no guest.
const AT_ONCE: Duration = Duration::from_secs(1);

fn fake(containerd: &Containerd) -> Result<(FakeVmm, Bundle)> {
    let fake = FakeVmm::start(containerd)?;
    containerd.configure(&fake.setup())?;
    Ok((fake, Bundle::busybox(containerd)?))
}

fn run<'a>(containerd: &'a Containerd, rootfs: &Bundle, script: &str) -> Result<Run<'a>> {
    Ok(containerd.run_spec(&rootfs.config(&["sh", "-c", script], |_| ())?))
}

/// The process that is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Shim,
    Qemu,
}

impl Victim {
    fn find(self, containerd: &Containerd, id: &str) -> Result<Pid> {
        let words = match self {
            Self::Shim => ["containerd-shim-machinen-v1", "-id"],
            Self::Qemu => ["qemu-system", "microvm"],
        };
        let inventory = containerd.inventory()?;
        let mut processes = inventory.processes.iter();
        let found = processes
            .find(|process| words.iter().chain([&id]).all(|word| process.command.contains(word)))
            .with_context(|| format!("no {self:?} of {id} in\n{inventory}"))?;
        Ok(Pid::from_raw(found.pid.cast_signed()))
    }
}

/// The moment of a creation at which the process is killed.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The rootfs is being converted, while the VM starts.
    Conversion,
    /// The VM acts according to its behaviour.
    Vm(Behaviour),
    /// The container runs.
    Running,
}

/// A converter that reports its start in one fifo, and waits for another that has no writer. It sees the tree that it
/// copies and nothing else, so the fifos are in the tree.
fn hanging_converter(containerd: &Containerd, rootfs: &Bundle) -> Result<std::path::PathBuf> {
    let path = containerd.root().join("mke2fs-hanging");
    for name in ["reached", "never"] {
        let fifo = rootfs.rootfs().join(name);
        mkfifo(&fifo, Mode::S_IRWXU)?;
        // Whatever the umask is.
        fs::set_permissions(&fifo, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    }
    let text = "#!/bin/sh\n[ \"$1\" = -V ] && exec mke2fs -V\ntree=/proc/self/fd/0\n\
        echo > $tree/reached; read x < $tree/never\n";
    fs::write(&path, text)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path)
}

fn killed_at_each_step(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let converter = hanging_converter(containerd, &rootfs)?;
    // The cache has an empty writable disk from now on, so that the converter is asked for base disks only.
    ensure!(run(containerd, &rootfs, "echo well")?.output()?.text() == "well\n", "nothing was killed yet");
    let steps = [
        Step::Conversion,
        Step::Vm(Behaviour::HangsOn("qmp_capabilities")),
        Step::Vm(Behaviour::HangsOn("add-fd")),
        Step::Vm(Behaviour::HangsOn("blockdev-add")),
        Step::Vm(Behaviour::HangsOn("device_add")),
        Step::Vm(Behaviour::Silent),
        Step::Vm(Behaviour::StopsAgentOn("device_add")),
        Step::Running,
    ];
    for step in steps {
        for victim in [Victim::Shim, Victim::Qemu] {
            let error = hit(containerd, &fake, &rootfs, &converter, step, victim);
            let error = error.with_context(|| format!("{victim:?} killed at {step:?}"))?;
            println!("{victim:?} killed at {step:?}: {error}");
        }
    }
    Ok(())
}

/// Kills a process at one step; returns the user's message. Nothing is left, and the same container works.
fn hit(
    containerd: &Containerd,
    fake: &FakeVmm,
    rootfs: &Bundle,
    converter: &Path,
    step: Step,
    victim: Victim,
) -> Result<String> {
    let before = containerd.inventory()?;
    if let Step::Conversion = step {
        fs::write(
            rootfs.rootfs().join(containerd.new_id()),
            "a new file, so that there is no base disk yet",
        )?;
        containerd.configure(&fake.setup().set("rootdisk", "mke2fs", Value::path(converter)))?;
    }
    fake.behaviour(if let Step::Vm(behaviour) = step { behaviour } else { Behaviour::Well });
    if let (Step::Running, Victim::Shim) = (step, victim) {
        let error = kill_the_shim_of_a_running_one(containerd, rootfs)?;
        fake.settle()?;
        containerd.settle(&before)?;
        return Ok(error);
    }
    let doomed = run(containerd, rootfs, "echo running; sleep 1000")?;
    let running = doomed.spawn(Duration::from_secs(60))?;
    match step {
        Step::Conversion => _ = fs::read(rootfs.rootfs().join("reached"))?,
        Step::Vm(_) => fake.wait_until_one_hangs()?,
        Step::Running => running.wait_for_stdout("running")?,
    }
    kill(victim.find(containerd, doomed.container())?, Signal::SIGKILL)?;
    let killed = Instant::now();
    let output = running.wait()?;
    let took = killed.elapsed();
    ensure!(output.status != 0, "the start should have failed: {output}");
    if let (Step::Running, Victim::Qemu) = (step, victim) {
        ensure!(output.status == 137 && took < AT_ONCE, "after {took:?}: {output}");
    }
    fake.settle()?;
    containerd.settle(&before)?;
    // The same container, on the same rootfs.
    containerd.configure(&fake.setup())?;
    fake.behaviour(Behaviour::Well);
    let again = run(containerd, rootfs, "echo well")?.id(doomed.container()).output()?;
    ensure!(again.status == 0 && again.text() == "well\n", "the next try: {again}");
    fake.settle()?;
    containerd.settle(&before)?;
    let words = output.error_text();
    Ok(format!("status {} after {took:.1?}: {}", output.status, words.lines().last().unwrap_or_default()))
}

/// In the background, since `ctr` leaves its fifos when it cannot delete the task.
fn kill_the_shim_of_a_running_one(containerd: &Containerd, rootfs: &Bundle) -> Result<String> {
    let run = run(containerd, rootfs, "sleep 1000")?.detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let from = containerd.log().position();
    kill(Victim::Shim.find(containerd, &id)?, Signal::SIGKILL)?;
    // containerd notices the end, runs the shim's `delete` to clean up, and reports an exit in the shim's
    // place.
    containerd.log().wait_for(from, |line| line.contains("shim disconnected") && line.contains(&id))?;
    let deleted = containerd.ctr_output(&["tasks", "delete", "--force", &id])?;
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(format!("delete reports: {}", deleted.error_text().trim()))
}

fn agent_killed(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let doomed = run(containerd, &rootfs, "echo running; sleep 1000")?;
    let running = doomed.spawn(Duration::from_secs(60))?;
    running.wait_for_stdout("running")?;
    for agent in fake.agents()? {
        kill(agent, Signal::SIGKILL)?;
    }
    let killed = Instant::now();
    let output = running.wait()?;
    ensure!(output.status == 137 && killed.elapsed() < AT_ONCE, "after {:?}: {output}", killed.elapsed());
    fake.settle()
}

/// The address of the shim that serves a container of containerd's.
fn client_of(containerd: &Containerd, id: &str) -> Result<Client> {
    let address = fs::read_to_string(containerd.bundle(id).join("address")).context("no shim")?;
    Client::connect(&address, V3)
}

fn agent_hangs(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let config = rootfs.config(&["sleep", "1000"], |_| ())?;
    let run = containerd.run_spec(&config).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let [agent] = fake.agents()?[..] else { anyhow::bail!("not one agent") };
    kill(agent, Signal::SIGSTOP)?;

    let client = client_of(containerd, &id)?;
    let begun = Instant::now();
    let state: api::StateResponse =
        client.ok("State", &api::StateRequest { id: id.clone(), ..Default::default() })?;
    let pids: api::PidsResponse =
        client.ok("Pids", &api::PidsRequest { id: id.clone(), ..Default::default() })?;
    ensure!(pids.processes[0].pid == state.pid, "{pids:?}");
    ensure!(begun.elapsed() < AT_ONCE, "requests that need no guest took {:?}", begun.elapsed());

    // Requests that need the agent end with an error after a deadline, all of them at the same time.
    std::thread::scope(|scope| -> Result<()> {
        let refusals = [
            scope.spawn(|| {
                let stats = api::StatsRequest { id: id.clone(), ..Default::default() };
                client_of(containerd, &id)?.refused("Stats", &stats)
            }),
            scope.spawn(|| {
                let term = api::KillRequest { id: id.clone(), signal: 15, ..Default::default() };
                client_of(containerd, &id)?.refused("Kill", &term)
            }),
            scope.spawn(|| {
                let pause = api::PauseRequest { id: id.clone(), ..Default::default() };
                client_of(containerd, &id)?.refused("Pause", &pause)
            }),
        ];
        for refusal in refusals {
            let (code, message) = refusal.join().expect("calling does not panic")?;
            ensure!(code == Code::DEADLINE_EXCEEDED && message.contains("within"), "{code:?}: {message}");
        }
        Ok(())
    })?;
    let from = containerd.log().position();
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", &id])?;
    containerd.log().wait_for_event(from, "/tasks/exit")?;
    let deleted = containerd.ctr_output(&["tasks", "delete", &id])?;
    ensure!(deleted.error_text().contains("137") || deleted.status == 137, "{deleted}");
    containerd.ctr_ok(&["containers", "delete", &id])?;
    fake.settle()
}

fn twenty_at_once(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    twenty_are_right(containerd, &rootfs)?;
    fake.settle()
}

fn twenty_vms_at_once(containerd: &mut Containerd) -> Result<()> {
    twenty_are_right(containerd, &Bundle::busybox(containerd)?)
}

fn twenty_are_right(containerd: &Containerd, rootfs: &Bundle) -> Result<()> {
    let one = |code: u32| -> Result<Run<'_>> {
        let shared = rootfs.config(&["sh", "-c", &format!("seq 1 {code}000; exit {code}")], |_| ())?;
        // All specifications of a rootfs have one name.
        let own = shared.with_extension(format!("{code}.json"));
        fs::rename(shared, &own)?;
        Ok(containerd.run_spec(&own))
    };
    let runs = (0..20).map(one).collect::<Result<Vec<_>>>()?;
    let running: Vec<_> =
        runs.iter().map(|run| run.spawn(Duration::from_secs(240))).collect::<Result<_>>()?;
    for (code, running) in (0..).zip(running) {
        let output = running.wait()?;
        let lines = output.text().lines().count();
        ensure!(output.status == code && lines == code as usize * 1000, "should be {code}: {output}");
    }
    Ok(())
}

/// What a process holds: descriptors, memory in KiB, children.
fn held(pid: u32) -> Result<(usize, u64, usize)> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    let children = machinen_integration::inventory::descendants(pid)?.len();
    Ok((descriptors, resident.context("no VmRSS")?.parse()?, children))
}

fn files(dir: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // The rootfs belongs to the image.
        count += 1 + if entry.file_type()?.is_dir() { files(&entry.path())? } else { 0 };
    }
    Ok(count)
}

/// The number of files in the root, except containerd's own, which come and go at any time.
fn our_files(containerd: &Containerd) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(containerd.root())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name() != "r" {
            count += files(&entry.path())?;
        }
    }
    Ok(count)
}

fn two_hundred_lives_in_one_shim(containerd: &mut Containerd) -> Result<()> {
    let (fake, rootfs) = fake(containerd)?;
    let shim = Shim::new(containerd)?;
    fs::copy(rootfs.config(&["true"], |_| ())?, shim.bundle.join("config.json"))?;
    let client = Client::connect(String::from_utf8(shim.start(0)?.stdout)?.trim(), V3)?;
    let id = || shim.id.clone();
    let connect = api::ConnectRequest { id: id(), ..Default::default() };
    let pid = client.ok::<api::ConnectResponse>("Connect", &connect)?.shim_pid;
    let live = |lives: u32| -> Result<()> {
        for life in 0..lives {
            client.ok::<api::CreateTaskResponse>("Create", &shim.create_request())?;
            if life % 4 == 0 {
                // A container that is never started ends too.
                let delete = api::DeleteRequest { id: id(), ..Default::default() };
                client.ok::<api::DeleteResponse>("Delete", &delete)?;
                continue;
            }
            client
                .ok::<api::StartResponse>("Start", &api::StartRequest { id: id(), ..Default::default() })?;
            client.ok::<api::WaitResponse>("Wait", &api::WaitRequest { id: id(), ..Default::default() })?;
            client.ok::<api::DeleteResponse>(
                "Delete",
                &api::DeleteRequest { id: id(), ..Default::default() },
            )?;
        }
        fake.settle()
    };
    live(20)?;
    let (before, files_before) = (held(pid)?, our_files(containerd)?);
    live(200)?;
    // The kernel takes some time to remove the tap devices of a VM that has ended.
    eventually(&format!("no more than {} descriptors", before.0), || Ok(held(pid)?.0 <= before.0))?;
    let (after, files_after) = (held(pid)?, our_files(containerd)?);
    println!(
        "descriptors, KiB, children: {before:?} became {after:?}; files: {files_before} became {files_after}"
    );
    ensure!(after.1 <= before.1 + 1024, "{} KiB became {}", before.1, after.1);
    ensure!(after.2 <= before.2, "{} children became {}", before.2, after.2);
    ensure!(files_after <= files_before, "{files_before} files became {files_after}");
    client.ok::<api::Empty>("Shutdown", &api::ShutdownRequest { id: id(), ..Default::default() })?;
    fs::remove_dir_all(&shim.bundle)?;
    Ok(())
}
