//! The real Podman as a client of the command line: the same commands with runc show that the tests ask for nothing
//! special.

mod checkpoint;
mod images;
mod network;
mod older;
mod options;
mod pods;
mod rootless;
mod verbs;
mod volumes;

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    image::Image,
    podman::{Podman, PodmanCommands as _, Version},
    runtime::Runtime,
};

use crate::harness::IMAGE;

/// Makes a test with each runtime of each function `fn(&Podman) -> Result<()>`.
macro_rules! with_podman {
    ($($test:ident),* $(,)?) => {
        mod runc { $(#[test] fn $test() { $crate::podman::run($crate::podman::NEWER, machinen_integration::runtime::Runtime::Runc, super::$test); })* }
        mod machinen { $(#[test] fn $test() { $crate::podman::run($crate::podman::NEWER, machinen_integration::runtime::Runtime::Machinen, super::$test); })* }
    };
}
use with_podman;

/// The version of most tests.
const NEWER: Version = Version::V5;

with_podman!(exit_codes, streams, a_life_in_the_background, stopped_in_time, removed_by_force);

fn run(version: Version, runtime: Runtime, test: fn(&Podman) -> Result<()>) {
    let podman = Podman::start(version, runtime).unwrap_or_else(|error| panic!("{error:#}"));
    attempt(&podman, test).unwrap_or_else(|error| panic!("with {version:?} and {runtime:?}: {error:#}"));
}

fn attempt(podman: &Podman, test: fn(&Podman) -> Result<()>) -> Result<()> {
    podman.load(&Image::busybox()?)?;
    let before = podman.inventory()?;
    test(podman)?;
    podman.settle(&before)
}

/// Runs a script to its end in a container without a network.
fn script(podman: &Podman, flags: &[&str], script: &str) -> Result<String> {
    podman.ok(&[&["run", "--rm", "--network", "none"], flags, &[IMAGE, "sh", "-c", script]].concat())
}

/// Starts a script in the background in a container without a network.
fn start(podman: &Podman, name: &str, flags: &[&str], script: &str) -> Result<String> {
    let run = ["run", "-d", "--name", name, "--network", "none"];
    podman.ok(&[&run[..], flags, &[IMAGE, "sh", "-c", script]].concat())
}

/// Ends a container and removes it.
fn remove(podman: &Podman, name: &str) -> Result<()> {
    podman.ok(&["rm", "--force", "--time", "0", name]).map(drop)
}

/// What `podman inspect` knows about a container.
fn inspect(podman: &Podman, format: &str, name: &str) -> Result<String> {
    podman.ok(&["inspect", "--format", format, name])
}

/// Waits until a container has printed a text.
fn printed(podman: &Podman, name: &str, text: &str) -> Result<()> {
    podman.podman(&["logs", "--follow", name])?.spawn()?.wait_for_stdout(text)
}

fn exit_codes(podman: &Podman) -> Result<()> {
    for (command, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        (&["/bin/not-executable"], 126),
        (&["no-such-command"], 127),
    ] {
        let output = podman.output(&[&["run", "--rm", "--network", "none", IMAGE], command].concat())?;
        ensure!(output.status == status, "{command:?}: {output}");
    }
    Ok(())
}

fn streams(podman: &Podman) -> Result<()> {
    let script = "echo out; echo err >&2; ls /sys/class/net; hostname";
    let flags = ["run", "--rm", "--network", "none", "--hostname", "named", IMAGE, "sh", "-c", script];
    let output = podman.output(&flags)?.ok()?;
    ensure!(output.text() == "out\nlo\nnamed\n" && output.error_text() == "err\n", "{output}");
    Ok(())
}

fn a_life_in_the_background(podman: &Podman) -> Result<()> {
    let script = "echo begun; trap 'echo ending; exit 5' TERM; while :; do sleep 1; done";
    let id = start(podman, "life", &[], script)?;
    printed(podman, "life", "begun\n")?;
    let output = podman.output(&["exec", "life", "sh", "-c", "echo inside; exit 3"])?;
    ensure!(output.status == 3 && output.text() == "inside\n", "{output}");
    let state = inspect(podman, "{{.Id}} {{.State.Status}} {{.OCIRuntime}}", "life")?;
    ensure!(state == format!("{id} running {}", podman.runtime().name()), "{state}");
    let pid = inspect(podman, "{{.State.Pid}}", "life")?;
    let network =
        podman.host().program("readlink")?.args([format!("/proc/{pid}/ns/net"), "/proc/self/ns/net".into()]);
    let network = network.run()?.ok()?.text();
    let (container, host) = network.trim_end().split_once('\n').context("not two links")?;
    ensure!(container != host, "the pid of {id} is in the host's network");
    podman.ok(&["stop", "--time", "60", "life"])?;
    let logs = podman.ok(&["logs", "life"])?;
    ensure!(logs == "begun\nending", "{logs}");
    let state = inspect(podman, "{{.State.Status}} {{.State.ExitCode}}", "life")?;
    ensure!(state == "exited 5", "{state}");
    podman.ok(&["rm", "life"]).map(drop)
}

/// A container that ignores SIGTERM is killed.
fn stopped_in_time(podman: &Podman) -> Result<()> {
    podman.ok(&["run", "-d", "--name", "stubborn", "--network", "none", IMAGE, "sleep", "1000"])?;
    podman.ok(&["stop", "--time", "1", "stubborn"])?;
    let state = inspect(podman, "{{.State.ExitCode}}", "stubborn")?;
    ensure!(state == "137", "{state}");
    podman.ok(&["rm", "stubborn"]).map(drop)
}

fn removed_by_force(podman: &Podman) -> Result<()> {
    podman.ok(&["create", "--name", "created", "--network", "none", IMAGE, "true"])?;
    start(podman, "running", &[], "sleep 1000")?;
    start(podman, "paused", &[], "sleep 1000")?;
    podman.ok(&["pause", "paused"])?;
    let refused = podman.output(&["rm", "running"])?;
    ensure!(refused.status != 0 && refused.error_text().contains("running"), "{refused}");
    podman.ok(&["rm", "--force", "--time", "0", "created", "running", "paused"])?;
    ensure!(podman.ok(&["ps", "--all", "--quiet"])?.is_empty());
    Ok(())
}
