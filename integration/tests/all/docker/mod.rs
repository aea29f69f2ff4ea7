//! The real Docker as a client: the same commands with runc show that the tests ask for nothing special.

mod compose;
mod images;
mod network;
mod options;
mod verbs;
mod volumes;

use std::fs;

use anyhow::{Context as _, Result, ensure};
use machinen_integration::{containerd::Containerd, docker::Docker, image::Image, paths::Version};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::{self, IMAGE};

/// Makes a test of each function `fn(&Docker, runtime: &str) -> Result<()>` with a runtime.
macro_rules! with_docker {
    ($name:ident, $runtime:ident: $($test:ident),* $(,)?) => {
        mod $name {
            $(#[test] fn $test() {
                $crate::docker::run(machinen_integration::docker::$runtime, super::$test);
            })*
        }
    };
}
use with_docker;

with_docker!(runc, RUNC: exit_codes, streams, a_life_in_the_background, files_are_copied, stopped_in_time);
with_docker!(
    machinen, MACHINEN: exit_codes, streams, a_life_in_the_background, files_are_copied, stopped_in_time,
    the_mount_of_a_killed_shims_container_is_dockers_again
);

/// The containerd of the same suite as dockerd.
const CONTAINERD: Version = Version::V1_7;

fn run(runtime: &str, test: fn(&Docker<'_>, &str) -> Result<()>) {
    harness::run(CONTAINERD, |containerd: &mut Containerd| {
        let docker = Docker::start(containerd, runtime)?;
        docker.import(&Image::busybox()?)?;
        // dockerd stays until the end of the test, so it is no leftover.
        let before = containerd.inventory()?;
        test(&docker, runtime)?;
        containerd.settle(&before)?;
        docker.stop()
    });
}

/// `docker run` without a network, and with this runtime.
fn run_args<'a>(runtime: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--runtime", runtime, "--network", "none"], more].concat()
}

fn exit_codes(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    for (command, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        (&["/bin/not-executable"], 126),
        (&["no-such-command"], 127),
    ] {
        let output = docker.output(&run_args(runtime, &[&["--rm", IMAGE], command].concat()))?;
        ensure!(output.status == status, "{command:?}: {output}");
    }
    Ok(())
}

fn streams(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "echo out; echo err >&2; ls /sys/class/net; hostname";
    let args = run_args(runtime, &["--rm", "--hostname", "named", IMAGE, "sh", "-c", script]);
    let output = docker.output(&args)?.ok()?;
    ensure!(output.text() == "out\nlo\nnamed\n" && output.error_text() == "err\n", "{output}");
    Ok(())
}

fn a_life_in_the_background(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "echo begun; trap 'echo ending; exit 5' TERM; while :; do sleep 1; done";
    let id = docker.ok(&run_args(runtime, &["-d", "--name", "life", IMAGE, "sh", "-c", script]))?;
    let output = docker.output(&["exec", "life", "sh", "-c", "echo inside; exit 3"])?;
    ensure!(output.status == 3 && output.text() == "inside\n", "{output}");
    let state =
        docker.ok(&["inspect", "--format", "{{.Id}} {{.State.Status}} {{.HostConfig.Runtime}}", "life"])?;
    ensure!(state == format!("{id} running {runtime}"), "{state}");
    let pid = docker.ok(&["inspect", "--format", "{{.State.Pid}}", "life"])?;
    let network = fs::read_link(format!("/proc/{pid}/ns/net"))?;
    ensure!(network != fs::read_link("/proc/self/ns/net")?, "the pid of {id} is in the host's network");
    docker.ok(&["stop", "--time", "60", "life"])?;
    let logs = docker.ok(&["logs", "life"])?;
    ensure!(logs == "begun\nending", "{logs}");
    let state = docker.ok(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "life"])?;
    ensure!(state == "exited 5", "{state}");
    docker.ok(&["rm", "life"]).map(drop)
}

/// Both ways, while the container runs and after it has ended.
fn files_are_copied(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script =
        "echo from the container > /written; while [ ! -e /end ]; do sleep 0.1; done; cat /given > /taken";
    docker.ok(&run_args(runtime, &["-d", "--name", "copied", IMAGE, "sh", "-c", script]))?;
    let dir = docker.dir().join("copies");
    fs::create_dir(&dir)?;
    let file = |name: &str| dir.join(name).display().to_string();
    fs::write(file("given"), "from the host\n")?;
    docker.ok(&["cp", &file("given"), "copied:/given"])?;
    // What the container has written is seen at once, also by a copy of a directory.
    docker.ok(&["exec", "copied", "sh", "-c", "mkdir -p /tree/deep; echo now > /tree/deep/file"])?;
    docker.ok(&["cp", "copied:/tree/deep", &file("deep")])?;
    ensure!(fs::read_to_string(dir.join("deep/file"))? == "now\n", "the copy of a directory");
    docker.ok(&["cp", "copied:/written", &file("early")])?;
    ensure!(fs::read_to_string(file("early"))? == "from the container\n", "a copy while the container runs");
    docker.ok(&["cp", &file("deep"), "copied:/back"])?;
    docker.ok(&["exec", "copied", "sh", "-c", "cat /written && cat /back/file && touch /end"])?;
    ensure!(docker.ok(&["wait", "copied"])? == "0");
    for (name, content) in [("written", "from the container\n"), ("taken", "from the host\n")] {
        docker.ok(&["cp", &format!("copied:/{name}"), &file(name)])?;
        ensure!(fs::read_to_string(file(name))? == content, "{name}");
    }
    docker.ok(&["rm", "copied"])?;
    Ok(fs::remove_dir_all(dir)?)
}

/// A container that ignores SIGTERM is killed.
fn stopped_in_time(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    docker.ok(&run_args(runtime, &["-d", "--name", "stubborn", IMAGE, "sleep", "1000"]))?;
    docker.ok(&["stop", "--time", "1", "stubborn"])?;
    let state = docker.ok(&["inspect", "--format", "{{.State.ExitCode}}", "stubborn"])?;
    ensure!(state == "137", "{state}");
    docker.ok(&["rm", "stubborn"]).map(drop)
}

/// Nothing covers dockerd's mount of the root file system then, which dockerd unmounts, and the container starts again.
fn the_mount_of_a_killed_shims_container_is_dockers_again(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let id = docker.ok(&run_args(runtime, &["-d", "--name", "lost", IMAGE, "sleep", "1000"]))?;
    let views = || -> Result<usize> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let dir = docker.dir().display().to_string();
        let is_view = |line: &&str| line.contains(" - fuse.machinen ") && line.contains(&dir);
        Ok(mounts.lines().filter(is_view).count())
    };
    ensure!(views()? == 1, "the view does not cover dockerd's mount");
    let pid = docker.ok(&["inspect", "--format", "{{.State.Pid}}", "lost"])?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let shim =
        status.lines().find_map(|line| line.strip_prefix("PPid:")).context("no parent")?.trim().parse()?;
    kill(Pid::from_raw(shim), Signal::SIGKILL)?;
    ensure!(docker.ok(&["wait", "lost"])? == "137");
    ensure!(views()? == 0, "a view is left");
    docker.ok(&["start", "lost"])?;
    let state = docker.ok(&["inspect", "--format", "{{.Id}} {{.State.Status}}", "lost"])?;
    ensure!(state == format!("{id} running"), "{state}");
    docker.ok(&["rm", "--force", "lost"]).map(drop)
}
