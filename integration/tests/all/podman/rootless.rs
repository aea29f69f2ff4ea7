//! The real Podman of an ordinary user.

use std::{fs, os::unix::fs::MetadataExt as _, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    image::Image,
    inventory::Inventory,
    podman::{PodmanCommands as _, Version},
    rootless::RootlessPodman,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::harness::IMAGE;

/// How long a port may take to be served.
const CLIENT: Duration = Duration::from_secs(60);

/// Makes a test with each version of each function `fn(&RootlessPodman) -> Result<()>`.
macro_rules! with_rootless_podman {
    ($($test:ident),* $(,)?) => {
        mod older { $(#[test] fn $test() { super::run(machinen_integration::podman::Version::V4, super::$test); })* }
        mod newer { $(#[test] fn $test() { super::run(machinen_integration::podman::Version::V5, super::$test); })* }
    };
}

with_rootless_podman!(
    exit_codes,
    a_life,
    a_users_files,
    a_second_start,
    a_killed_monitor,
    its_own_directories_and_users,
    a_pod,
    published_ports
);

fn run(version: Version, test: fn(&RootlessPodman) -> Result<()>) {
    let podman = RootlessPodman::start(version).unwrap_or_else(|error| panic!("{error:#}"));
    let loaded = Image::busybox().and_then(|image| podman.load(&image));
    let result = loaded.and_then(|()| test(&podman));
    result.unwrap_or_else(|error| panic!("with {version:?}: {error:#}"));
}

fn start(podman: &RootlessPodman, name: &str, script: &str) -> Result<String> {
    podman.ok(&["run", "-d", "--name", name, "--network", "none", IMAGE, "sh", "-c", script])
}

fn remove(podman: &RootlessPodman, name: &str) -> Result<()> {
    podman.ok(&["rm", "--force", "--time", "0", name]).map(drop)
}

fn exit_codes(podman: &RootlessPodman) -> Result<()> {
    for (command, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        (&["no-such"], 127),
    ] {
        let output = podman.output(&[&["run", "--rm", "--network", "none", IMAGE], command].concat())?;
        ensure!(output.status == status, "{command:?}: {output}");
    }
    Ok(())
}

fn a_life(podman: &RootlessPodman) -> Result<()> {
    start(podman, "life", "echo begun; trap 'echo ending; exit 5' TERM; while :; do sleep 1; done")?;
    podman.podman(&["logs", "--follow", "life"])?.spawn()?.wait_for_stdout("begun\n")?;
    let output = podman.output(&["exec", "life", "sh", "-c", "echo inside; exit 3"])?;
    ensure!(output.status == 3 && output.text() == "inside\n", "{output}");
    podman.ok(&["stop", "--time", "60", "life"])?;
    ensure!(podman.ok(&["logs", "life"])? == "begun\nending");
    let state = podman.ok(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "life"])?;
    ensure!(state == "exited 5", "{state}");
    podman.ok(&["rm", "life"])?;
    start(podman, "stubborn", "trap '' TERM; sleep 1000")?;
    podman.ok(&["kill", "stubborn"])?;
    ensure!(podman.ok(&["wait", "stubborn"])? == "137");
    remove(podman, "stubborn")
}

/// What the container's root writes in a volume belongs to the user.
fn a_users_files(podman: &RootlessPodman) -> Result<()> {
    let volume = podman.home().join("volume");
    podman.program("mkdir")?.arg(&volume).run()?.ok()?;
    podman.program("sh")?.args(["-c", "echo mine > $0/file"]).arg(&volume).run()?.ok()?;
    let mount = format!("{}:/v", volume.display());
    let script = "cat /v/file; echo new > /v/new; echo image > /changed; rm /bin/wc";
    let output =
        podman.ok(&["run", "--name", "it", "--network", "none", "-v", &mount, IMAGE, "sh", "-c", script])?;
    ensure!(output == "mine", "{output}");
    let owner = fs::metadata(volume.join("new")).context("the new file is missing")?.uid();
    ensure!(owner == podman.user(), "the new file belongs to {owner}");
    // What was written in the root file system is in the layer of the container.
    let diff = podman.ok(&["diff", "it"])?;
    ensure!(diff.contains("A /changed") && diff.contains("D /bin/wc"), "{diff}");
    podman.ok(&["commit", "--quiet", "it", "changed:1"])?;
    let script = "cat /changed; ls /bin/wc; true";
    let output = podman.ok(&["run", "--rm", "--network", "none", "changed:1", "sh", "-c", script])?;
    ensure!(output == "image", "{output}");
    remove(podman, "it")
}

/// A directory of the image that the container has replaced is still the container's own.
fn a_second_start(podman: &RootlessPodman) -> Result<()> {
    let script =
        "ls /replaced /etc; [ -e /replaced ] || { rm -r /etc; mkdir /etc /replaced; echo new > /etc/new; }";
    let output = podman.output(&["run", "--name", "it", "--network", "none", IMAGE, "sh", "-c", script])?;
    ensure!(output.status == 0 && output.text().contains("passwd"), "{output}");
    let again = podman.ok(&["start", "--attach", "it"])?;
    ensure!(again.contains("new") && !again.contains("passwd"), "{again}");
    remove(podman, "it")
}

/// Neither QEMU nor another process of the VM outlives the owner of the VM, and the container can be removed.
fn a_killed_monitor(podman: &RootlessPodman) -> Result<()> {
    let of_machinen = |left: Inventory| {
        let files = left.files.into_iter().filter(|file| file.contains("/machinen/"));
        files.filter(|file| !file.contains("/machinen/accel")).collect::<Vec<_>>()
    };
    start(podman, "first", "true")?;
    podman.ok(&["wait", "first"])?;
    remove(podman, "first")?;
    let before = podman.host().inventory(&[])?;
    start(podman, "it", "sleep 1000")?;
    let processes = podman.host().processes()?;
    let monitor = processes.iter().find(|process| process.command.contains("container-monitor"));
    let pid = monitor.context("no monitor")?.pid;
    ensure!(processes.iter().any(|process| process.command.contains("qemu-system")), "no QEMU");
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)?;
    ensure!(podman.ok(&["wait", "it"])? == "137");
    remove(podman, "it")?;
    let left = of_machinen(podman.host().settle(&before, &[])?);
    ensure!(left.is_empty(), "{left:?}");
    start(podman, "again", "true")?;
    ensure!(podman.ok(&["wait", "again"])? == "0");
    remove(podman, "again")
}

/// The state is below the user's directories, for no other user, and QEMU runs as another user than the user.
fn its_own_directories_and_users(podman: &RootlessPodman) -> Result<()> {
    start(podman, "it", "sleep 1000")?;
    let dir = podman.host().path(&format!("/run/user/{}/machinen", podman.user()));
    let status = fs::metadata(&dir)?;
    ensure!(status.mode() & 0o777 == 0o700 && status.uid() == podman.user(), "{status:?}");
    ensure!(!podman.host().path("/run/machinen/containers").exists(), "root's directory was used");
    let processes = podman.host().processes()?;
    let uids = processes.iter().map(|process| {
        let name = fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
        let owner = fs::metadata(format!("/proc/{}", process.pid)).map_or(0, |status| status.uid());
        let uid = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
        let uid = uid.lines().find_map(|line| line.strip_prefix("Uid:\t")).map(str::to_owned);
        (name.trim_end().to_owned(), owner, uid)
    });
    let qemu: Vec<_> =
        uids.filter(|(name, ..)| name.starts_with("qemu") || name.starts_with("machinen-")).collect();
    let in_range = |uid: &str| {
        uid.split_whitespace()
            .all(|uid| uid.parse().is_ok_and(|uid: u32| (1_000_000..1_065_536).contains(&uid)))
    };
    ensure!(qemu.iter().any(|(.., uid)| uid.as_deref().is_some_and(in_range)), "{qemu:?}");
    remove(podman, "it")
}

fn a_pod(podman: &RootlessPodman) -> Result<()> {
    podman.ok(&[
        "pod",
        "create",
        "--name",
        "pod",
        "--network",
        "none",
        "--infra-image",
        IMAGE,
        "--infra-command",
        "top",
    ])?;
    let server = ["run", "-d", "--pod", "pod", "--name", "server", IMAGE];
    podman.ok(&[&server[..], &["nc", "-ll", "-p", "80", "-e", "echo", "served"]].concat())?;
    let script = "until nc 127.0.0.1 80 < /dev/null | grep served; do sleep 0.1; done";
    let output = podman.ok(&["run", "--rm", "--pod", "pod", IMAGE, "sh", "-c", script])?;
    ensure!(output == "served", "{output}");
    podman.ok(&["pod", "rm", "--force", "--time", "0", "pod"]).map(drop)
}

/// Podman's own port handler connects to the container's address from inside of its network namespace.
fn published_ports(podman: &RootlessPodman) -> Result<()> {
    let server = ["nc", "-ll", "-p", "80", "-e", "echo", "served"];
    for (name, network, port) in
        [("default", "slirp4netns", 8080), ("slirp", "slirp4netns:port_handler=slirp4netns", 8081)]
    {
        let published = format!("{port}:80");
        let run = ["run", "-d", "--name", name, "--network", network, "-p", &published, IMAGE];
        podman.ok(&[&run[..], &server].concat())?;
        let script =
            format!("until busybox nc 127.0.0.1 {port} < /dev/null | grep served; do sleep 0.2; done");
        let output = podman.program("sh")?.args(["-c", &script]).deadline(CLIENT).run()?;
        ensure!(output.status == 0 && output.text() == "served\n", "{network}: {output}");
        remove(podman, name)?;
    }
    Ok(())
}

/// Podman's default network since version 5.
#[test]
fn connected_by_pasta() {
    run(Version::V5, |podman| {
        // pasta takes over what the host's own interface has.
        for command in [
            "link add up0 type veth peer name up1",
            "addr add 10.77.0.2/24 dev up0",
            "link set up0 up",
            "link set up1 up",
            "route add default via 10.77.0.1",
        ] {
            podman.host().program("ip")?.args(command.split(' ')).run()?.ok()?;
        }
        let server = ["nc", "-ll", "-p", "80", "-e", "echo", "served"];
        let run = ["run", "-d", "--name", "web", "--network", "pasta", "-p", "8082:80", IMAGE];
        podman.ok(&[&run[..], &server].concat())?;
        let script = "until busybox nc 127.0.0.1 8082 < /dev/null | grep served; do sleep 0.2; done";
        let output = podman.program("sh")?.args(["-c", script]).deadline(CLIENT).run()?;
        ensure!(output.status == 0 && output.text() == "served\n", "{output}");
        remove(podman, "web")
    });
}
