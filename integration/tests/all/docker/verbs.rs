//! What is done to a container after it was started.

use anyhow::{Result, ensure};
use machinen_integration::docker::{Docker, RUNC};

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(runc, RUNC: paused, restarted, observed, fed, healthy, events);
with_docker!(machinen, MACHINEN: paused, restarted, observed, fed, healthy, events);

/// Starts a container in the background.
fn start(docker: &Docker<'_>, runtime: &str, flags: &[&str], script: &str) -> Result<()> {
    let run = ["run", "-d", "--runtime", runtime, "--network", "none"];
    docker.ok(&[&run[..], flags, &[IMAGE, "sh", "-c", script]].concat()).map(drop)
}

fn state(docker: &Docker<'_>, format: &str, name: &str) -> Result<String> {
    docker.ok(&["inspect", "--format", format, name])
}

/// Waits until events of this kind have happened to a container, since it was made.
fn happened(docker: &Docker<'_>, container: &str, kind: &str, text: &str) -> Result<()> {
    let (container, event) = (format!("container={container}"), format!("event={kind}"));
    let filters = ["--filter", &container, "--filter", &event];
    let events = docker.docker(&["events", "--since", "30m", "--format", "{{.Action}}"])?.args(filters);
    events.spawn()?.wait_for_stdout(text)
}

fn paused(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    start(docker, runtime, &["--name", "paused"], "trap 'exit 5' USR1; while :; do sleep 0.1; done")?;
    docker.ok(&["pause", "paused"])?;
    ensure!(state(docker, "{{.State.Status}}", "paused")? == "paused");
    let refused = docker.output(&["exec", "paused", "true"])?;
    ensure!(refused.status != 0 && refused.error_text().contains("paused"), "{refused}");
    docker.ok(&["unpause", "paused"])?;
    docker.ok(&["update", "--memory", "100m", "--memory-swap", "100m", "paused"])?;
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2> /dev/null";
    let limit = docker.output(&["exec", "paused", "sh", "-c", script])?.text();
    ensure!(limit == "104857600\n", "{limit}");
    docker.ok(&["kill", "--signal", "USR1", "paused"])?;
    ensure!(docker.ok(&["wait", "paused"])? == "5");
    docker.ok(&["rm", "paused"]).map(drop)
}

fn restarted(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    start(docker, runtime, &["--name", "again", "--restart", "on-failure:2"], "echo run >> /runs; exit 3")?;
    docker.ok(&["wait", "again"])?;
    // The policy's next attempts begin after the exit that was waited for.
    happened(docker, "again", "die", "die\ndie\ndie\n")?;
    let state = state(docker, "{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}", "again")?;
    ensure!(state == "exited 2 3", "{state}");
    docker.ok(&["rm", "again"])?;
    start(docker, runtime, &["--name", "kept"], "echo started >> /starts; exec sleep 1000")?;
    docker.ok(&["restart", "--time", "1", "kept"])?;
    let starts = docker.ok(&["exec", "kept", "cat", "/starts"])?;
    ensure!(starts == "started\nstarted", "{starts}");
    docker.ok(&["rename", "kept", "renamed"])?;
    docker.ok(&["rm", "--force", "renamed"]).map(drop)
}

fn observed(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    start(docker, runtime, &["--name", "seen"], "sleep 1234 & echo one; echo two; wait")?;
    // What is in a VM are no processes of the host, which `docker top` shows.
    let top = docker.ok(&["top", "seen"])?;
    let shown = if runtime == RUNC { "sleep 1234" } else { "container-anchor" };
    ensure!(top.contains(shown), "{top}");
    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "seen"])?;
    ensure!(stats.starts_with("2 ") && !stats.starts_with("2 0B"), "{stats}");
    let logs = docker.ok(&["logs", "--tail", "1", "seen"])?;
    ensure!(logs == "two", "{logs}");
    docker.ok(&["rm", "--force", "seen"]).map(drop)
}

/// Input comes by `run -i`, by `exec -i` and by attach.
fn fed(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let piped = |args: &[&str]| -> Result<String> {
        let mut running = docker.docker(args)?.with_stdin().spawn()?;
        let mut stdin = running.stdin().expect("it was asked for");
        std::io::Write::write_all(&mut stdin, b"a line\n")?;
        drop(stdin);
        Ok(running.wait()?.ok()?.text())
    };
    let text = piped(&["run", "--rm", "-i", "--runtime", runtime, "--network", "none", IMAGE, "cat"])?;
    ensure!(text == "a line\n", "{text}");
    let run = ["run", "-d", "-i", "--name", "fed", "--runtime", runtime, "--network", "none", IMAGE];
    docker.ok(&[&run[..], &["sh", "-c", "read line; echo got $line; exec sleep 1000"]].concat())?;
    let text = piped(&["exec", "-i", "fed", "tr", "a-z", "A-Z"])?;
    ensure!(text == "A LINE\n", "{text}");
    let mut attached = docker.docker(&["attach", "fed"])?.with_stdin().spawn()?;
    let mut stdin = attached.stdin().expect("it was asked for");
    std::io::Write::write_all(&mut stdin, b"attached\n")?;
    attached.wait_for_stdout("got attached\n")?;
    docker.ok(&["rm", "--force", "fed"])?;
    drop(stdin);
    attached.wait().map(drop)
}

fn healthy(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let check = [
        "--health-cmd",
        "test -e /healthy",
        "--health-interval",
        "500ms",
        "--health-timeout",
        "30s",
        "--health-retries",
        "1",
    ];
    start(docker, runtime, &[&["--name", "patient"], &check[..]].concat(), "sleep 1000")?;
    happened(docker, "patient", "health_status", "health_status: unhealthy\n")?;
    docker.ok(&["exec", "patient", "touch", "/healthy"])?;
    happened(docker, "patient", "health_status", "health_status: healthy\n")?;
    docker.ok(&["rm", "--force", "patient"]).map(drop)
}

fn events(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    start(docker, runtime, &["--name", "eventful"], "exit 4")?;
    ensure!(docker.ok(&["wait", "eventful"])? == "4");
    docker.ok(&["rm", "eventful"])?;
    let filters = ["--filter", "event=create", "--filter", "event=start", "--filter", "event=die"];
    let events = docker.docker(&["events", "--since", "30m", "--format", "{{.Action}}"])?.args(filters);
    let all = events.args(["--filter", "container=eventful", "--filter", "event=destroy"]).spawn()?;
    // The last events may come after the answers to the requests.
    all.wait_for_stdout("create\nstart\ndie\ndestroy\n")?;
    Ok(())
}
