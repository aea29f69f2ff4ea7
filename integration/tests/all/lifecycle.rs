//! A task's states and events as containerd's clients see them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, task::Listed};

use crate::harness::{IMAGE, on_every_containerd, on_newest_containerd};

on_every_containerd!(run_kill_delete, events_come_in_order, survives_a_restart_of_containerd);
on_newest_containerd!(handled_signal, names_of_any_length, delete_with_force, many_at_once);

fn run_kill_delete(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let Listed { pid, status } = containerd.task(&id).listed()?;
    ensure!(status == "RUNNING", "the task is {status}");
    ensure!(pid > 1 && std::fs::exists(format!("/proc/{pid}"))?, "{pid} is not a process of the host");
    let processes = containerd.ctr_ok(&["tasks", "ps", &id])?;
    let listed = processes.lines().skip(1).filter_map(|line| line.split_whitespace().next()?.parse().ok());
    ensure!(listed.collect::<Vec<u32>>().contains(&pid), "no {pid} in\n{processes}");

    containerd.task(&id).kill()?;
    containerd.task(&id).delete(137)?;
    ensure!(containerd.task(&id).find()?.is_none(), "the task is still listed");
    Ok(())
}

fn events_come_in_order(containerd: &mut Containerd) -> Result<()> {
    let wanted = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    // The exit of a process that ends at once must not be reported before its start.
    for command in [["true"].as_slice(), &["sh", "-c", "sleep 1"]] {
        let from = containerd.log().position();
        containerd.run(IMAGE, command).ok()?;
        containerd.log().wait_for_event(from, "/tasks/delete")?;
        let events = containerd.log().events(from);
        ensure!(events == wanted, "{command:?} had the events {events:?}");
    }
    Ok(())
}

fn survives_a_restart_of_containerd(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let before = containerd.task(&id).find()?;
    containerd.restart()?;
    let after = containerd.task(&id).find()?;
    ensure!(before == after, "{before:?} became {after:?}");
    containerd.task(&id).kill()?;
    containerd.task(&id).delete(137)
}

fn handled_signal(containerd: &mut Containerd) -> Result<()> {
    let script = "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 1000 & wait; done";
    let run = containerd.run(IMAGE, &["sh", "-c", script]);
    let running = run.spawn(Duration::from_secs(60))?;
    // Before its handler is set, an init ignores the signal.
    running.wait_for_stdout("ready")?;
    containerd.ctr_ok(&["tasks", "kill", "--signal", "SIGUSR1", run.container()])?;
    let output = running.wait()?;
    ensure!(output.status == 3 && output.text() == "ready\ncaught\n", "{output}");
    Ok(())
}

fn names_of_any_length(containerd: &mut Containerd) -> Result<()> {
    // containerd allows 76 characters.
    let id = "i".repeat(76);
    let output = containerd.run(IMAGE, &["echo", "long"]).id(&id).ok()?;
    ensure!(output == "long\n", "{output}");
    let value = "v".repeat(4096);
    let mut run = containerd.run(IMAGE, &["sh", "-c", "env | wc -l; echo $LONG"]);
    for number in 0..1000 {
        run = run.flag("--env").flag(format!("VARIABLE_{number}=value {number}"));
    }
    let output = run.flag("--env").flag(format!("LONG={value}")).ok()?;
    let (count, long) = output.split_once('\n').context("no output")?;
    ensure!(count.parse::<u32>()? >= 1001, "{count} variables");
    ensure!(long.trim_end() == value, "a long value came as {} bytes", long.len());
    Ok(())
}

fn delete_with_force(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let refused = containerd.ctr_output(&["tasks", "delete", &id])?;
    ensure!(refused.status != 0, "a running task was deleted: {refused}");
    ensure!(containerd.task(&id).status()? == "RUNNING", "a refused delete changed the task");
    containerd.ctr_output(&["tasks", "delete", "--force", &id])?;
    ensure!(containerd.task(&id).find()?.is_none(), "the task is still there");
    containerd.ctr_ok(&["containers", "delete", &id])?;
    Ok(())
}

fn many_at_once(containerd: &mut Containerd) -> Result<()> {
    let runs: Vec<_> =
        (0..3).map(|code| containerd.run(IMAGE, &["sh", "-c", &format!("exit {code}")])).collect();
    let time = Duration::from_secs(120);
    let running = runs.iter().map(|run| run.spawn(time)).collect::<Result<Vec<_>>>()?;
    for (code, running) in (0..).zip(running) {
        let output = running.wait()?;
        ensure!(output.status == code, "should be {code}: {output}");
    }
    Ok(())
}
