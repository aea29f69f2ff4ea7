//! What is done to a container after it was started.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    podman::{Podman, PodmanCommands as _},
    terminal::Terminal,
};

use super::{inspect, printed, remove, start, with_podman};
use crate::harness::IMAGE;

with_podman!(paused, signalled, restarted, observed, executed, fed, attached, on_a_terminal, healthy);

fn paused(podman: &Podman) -> Result<()> {
    start(podman, "paused", &[], "sleep 1000")?;
    podman.ok(&["pause", "paused"])?;
    ensure!(inspect(podman, "{{.State.Status}}", "paused")? == "paused");
    let refused = podman.output(&["exec", "paused", "true"])?;
    ensure!(refused.status != 0 && refused.error_text().contains("running containers"), "{refused}");
    podman.ok(&["unpause", "paused"])?;
    podman.ok(&["update", "--memory", "100m", "paused"])?;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2> /dev/null";
    let limit = podman.output(&["exec", "paused", "sh", "-c", script])?.text();
    ensure!(limit == "104857600\n", "{limit}");
    remove(podman, "paused")
}

fn signalled(podman: &Podman) -> Result<()> {
    start(podman, "signalled", &[], "trap 'exit 5' USR1; echo ready; while :; do sleep 0.1; done")?;
    printed(podman, "signalled", "ready\n")?;
    podman.ok(&["kill", "--signal", "USR1", "signalled"])?;
    ensure!(podman.ok(&["wait", "signalled"])? == "5");
    podman.ok(&["start", "signalled"])?;
    podman.ok(&["kill", "signalled"])?;
    ensure!(podman.ok(&["wait", "signalled"])? == "137");
    podman.ok(&["rm", "signalled"]).map(drop)
}

fn restarted(podman: &Podman) -> Result<()> {
    start(podman, "kept", &[], "echo started >> /starts; exec sleep 1000")?;
    // The shell has written before it becomes sleep(1).
    let wait = "until [ $(cat /proc/1/comm) = sleep ]; do sleep 0.1; done; cat /starts";
    podman.ok(&["exec", "kept", "sh", "-c", wait])?;
    podman.ok(&["restart", "--time", "1", "kept"])?;
    podman.ok(&["exec", "kept", "sh", "-c", wait])?;
    podman.ok(&["stop", "--time", "0", "kept"])?;
    podman.ok(&["start", "kept"])?;
    let starts = podman.ok(&["exec", "kept", "sh", "-c", wait])?;
    ensure!(starts == "started\nstarted\nstarted", "{starts}");
    podman.ok(&["rename", "kept", "renamed"])?;
    remove(podman, "renamed")?;
    // The policy's attempts are made by the process that cleans up after each end.
    let flags = ["run", "--name", "again", "--network", "none", "--restart", "on-failure:1", IMAGE];
    podman.output(&[&flags[..], &["sh", "-c", "echo run; exit 3"]].concat())?;
    let events =
        ["events", "--filter", "container=again", "--filter", "event=died", "--format", "{{.Status}}"];
    podman.podman(&events)?.args(["--since", "30m"]).spawn()?.wait_for_stdout("died\ndied\n")?;
    remove(podman, "again")
}

fn observed(podman: &Podman) -> Result<()> {
    start(podman, "seen", &["--label", "a=b"], "sleep 1234 & echo one; echo two; wait")?;
    printed(podman, "seen", "two\n")?;
    let stats = podman.ok(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "seen"])?;
    // Podman reads the host's control group, which has the processes of a VM.
    let processes = if podman.runtime().has_vm() { "" } else { "2 " };
    ensure!(stats.starts_with(processes) && !stats.contains(" 0B /"), "{stats}");
    let logs = podman.ok(&["logs", "--tail", "1", "seen"])?;
    ensure!(logs == "two", "{logs}");
    let listed = podman.ok(&["ps", "--filter", "label=a=b", "--format", "{{.Names}} {{.State}}"])?;
    ensure!(listed == "seen running", "{listed}");
    let top = podman.ok(&["top", "seen", "comm"])?;
    ensure!(top.contains("sleep"), "{top}");
    remove(podman, "seen")
}

/// The options of `podman exec`.
fn executed(podman: &Podman) -> Result<()> {
    start(podman, "executed", &["--env", "A=1"], "sleep 1000")?;
    let script = "id -u; pwd; echo $A $B";
    let flags = ["--user", "7", "--workdir", "/tmp", "--env", "B=2", "executed", "sh", "-c", script];
    let output = podman.ok(&[&["exec"], &flags[..]].concat())?;
    ensure!(output == "7\n/tmp\n1 2", "{output}");
    for (command, status) in [
        (&["sh", "-c", "exit 7"][..], 7),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["/bin/not-executable"], 126),
        (&["no-such-command"], 127),
    ] {
        let output = podman.output(&[&["exec", "executed"], command].concat())?;
        ensure!(output.status == status, "{command:?}: {output}");
    }
    podman.ok(&["exec", "--detach", "executed", "sh", "-c", "echo detached > /written; exec sleep 1000"])?;
    let output = podman.ok(&[
        "exec",
        "executed",
        "sh",
        "-c",
        "until cat /written; do sleep 0.1; done 2> /dev/null",
    ])?;
    ensure!(output == "detached", "{output}");
    let output =
        podman.output(&["exec", "--privileged", "executed", "grep", "CapEff", "/proc/self/status"])?;
    ensure!(output.status == 0 && !output.text().contains("00000000800405fb"), "{output}");
    remove(podman, "executed")
}

/// Runs `podman` with a line as its input.
fn with_line(podman: &Podman, args: &[&str]) -> Result<String> {
    let mut running = podman.podman(args)?.with_stdin().spawn()?;
    let mut stdin = running.stdin().context("it was asked for")?;
    stdin.write_all(b"a line\n")?;
    drop(stdin);
    Ok(running.wait()?.ok()?.text())
}

/// Input comes by `run -i` and by `exec -i`, and its end is the end of the program's input.
fn fed(podman: &Podman) -> Result<()> {
    let text = with_line(podman, &["run", "--rm", "-i", "--network", "none", IMAGE, "cat"])?;
    ensure!(text == "a line\n", "{text}");
    start(podman, "fed", &[], "sleep 1000")?;
    let text = with_line(podman, &["exec", "-i", "fed", "tr", "a-z", "A-Z"])?;
    ensure!(text == "A LINE\n", "{text}");
    // More than a pipe holds.
    let script = "dd if=/dev/zero bs=1024 count=300 2> /dev/null | tr '\\0' x";
    let output = podman.ok(&["exec", "fed", "sh", "-c", script])?;
    ensure!(output.len() == 300 << 10, "{} bytes", output.len());
    remove(podman, "fed")
}

fn attached(podman: &Podman) -> Result<()> {
    start(podman, "fed", &["-i"], "echo ready; read line; echo got $line; exec sleep 1000")?;
    printed(podman, "fed", "ready\n")?;
    let mut attached = podman.podman(&["attach", "--sig-proxy=false", "fed"])?.with_stdin().spawn()?;
    let mut stdin = attached.stdin().context("it was asked for")?;
    stdin.write_all(b"attached\n")?;
    attached.wait_for_stdout("got attached\n")?;
    remove(podman, "fed")?;
    drop(stdin);
    attached.wait().map(drop)
}

fn on_a_terminal(podman: &Podman) -> Result<()> {
    let args = [
        "run",
        "--rm",
        "-it",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        "stty size; tty; read a; echo got-$a; exit 4",
    ];
    let mut terminal = Terminal::run(&podman.podman(&args)?, 70, 20)?;
    terminal.expect("/dev/pts/0")?;
    terminal.type_in("typed\r")?;
    terminal.expect("got-typed")?;
    let (status, output) = terminal.wait()?;
    ensure!(status == 4 && output.contains("20 70"), "{status} {output}");
    start(podman, "with", &["--tty"], "tty; exec sleep 1000")?;
    printed(podman, "with", "/dev/pts/0")?;
    let args = ["exec", "-it", "with", "sh", "-c", "test -t 0 -a -t 1 && read a && echo got-$a"];
    let mut terminal = Terminal::run(&podman.podman(&args)?, 70, 20)?;
    terminal.type_in("typed\r")?;
    terminal.expect("got-typed")?;
    ensure!(terminal.wait()?.0 == 0);
    remove(podman, "with")
}

/// Without systemd nothing starts the checks in intervals.
fn healthy(podman: &Podman) -> Result<()> {
    let flags = ["--health-cmd", "test -e /healthy", "--health-interval", "disable", "--health-retries", "1"];
    start(podman, "patient", &flags, "sleep 1000")?;
    let output = podman.output(&["healthcheck", "run", "patient"])?;
    ensure!(output.status == 1 && output.text().contains("unhealthy"), "{output}");
    podman.ok(&["exec", "patient", "touch", "/healthy"])?;
    podman.ok(&["healthcheck", "run", "patient"])?;
    let state = inspect(podman, "{{.State.Health.Status}}", "patient")?;
    ensure!(state == "healthy", "{state}");
    remove(podman, "patient")
}
