//! The real Docker as a client: the same commands with runc show that the tests ask for nothing special.

mod compose;
mod images;
mod network;
mod options;
mod verbs;
mod volumes;

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, docker::Docker, image::Image, paths::Version};

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
// dockerd copies into its own mount of the root file system, which a running VM does not see.
with_docker!(machinen, MACHINEN: exit_codes, streams, a_life_in_the_background, stopped_in_time);

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
    docker.ok(&["exec", "copied", "sh", "-c", "cat /written; touch /end"])?;
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
