//! Containers that cannot be run, and the users' error messages: commands, specifications, annotations.

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd, setup::Setup};
use serde_json::json;

use crate::harness::{IMAGE, fails_saying, on_every_containerd, on_newest_containerd, works};

on_every_containerd!(command_not_found);
on_newest_containerd!(
    command_not_executable,
    odd_specifications,
    rootfs_missing,
    annotations,
    annotations_of_the_default_configuration,
    longest_names,
);

fn command_not_found(containerd: &mut Containerd) -> Result<()> {
    let run = containerd.run(IMAGE, &["no-such-command", "argument"]);
    fails_saying(containerd, &run, &["no-such-command", "not found"])?;
    let run = containerd.run(IMAGE, &["/no/such/path"]);
    fails_saying(containerd, &run, &["/no/such/path", "no such file"])?;
    works(containerd)
}

fn command_not_executable(containerd: &mut Containerd) -> Result<()> {
    for (command, reason) in [
        ("/bin/not-executable", "permission denied"),
        ("/etc", "is a directory"),
        ("/bin/bad-interpreter", "no such file"),
        ("/bin/setuid", "exec format error"),
    ] {
        let run = containerd.run(IMAGE, &[command]);
        fails_saying(containerd, &run, &[command, reason])?;
    }
    works(containerd)
}

fn odd_specifications(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["true"], |spec| spec["process"]["args"] = json!([]))?;
    fails_saying(containerd, &containerd.run_spec(&config), &["no command", "process.args"])?;
    let config = bundle.config(&["true"], |spec| spec["process"]["cwd"] = json!("relative"))?;
    fails_saying(containerd, &containerd.run_spec(&config), &["relative", "process.cwd"])?;
    let config = bundle.config(&["true"], |spec| {
        spec["mounts"] = json!([{ "destination": "/x", "type": "nfs", "source": "server:/x" }]);
    })?;
    fails_saying(containerd, &containerd.run_spec(&config), &["/x", "nfs", "not supported"])?;
    let config = bundle.config(&["true"], |spec| {
        spec["hooks"] = json!({ "createRuntime": [{ "path": "bin/true" }] });
    })?;
    let words = ["hooks.createRuntime[0].path", "bin/true", "must be absolute"];
    fails_saying(containerd, &containerd.run_spec(&config), &words)?;
    let config = bundle.config(&["true"], |spec| {
        spec["linux"]["sysctl"] = json!({ "kernel.no_such_thing": "1" });
    })?;
    fails_saying(containerd, &containerd.run_spec(&config), &["kernel.no_such_thing"])?;
    works(containerd)
}

fn rootfs_missing(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["true"], |spec| spec["root"]["path"] = json!("/no/such/rootfs"))?;
    fails_saying(containerd, &containerd.run_spec(&config), &["/no/such/rootfs", "missing"])?;
    works(containerd)
}

fn annotations(containerd: &mut Containerd) -> Result<()> {
    for (annotation, words) in [
        ("io.machinen.vcpus=many", &["io.machinen.vcpus", "many", "1 to 64"][..]),
        ("io.machinen.memory-ceiling=1", &["io.machinen.memory-ceiling", "MiB"]),
        ("io.machinen.channel=pigeon", &["io.machinen.channel", "pigeon", "serial"]),
        ("io.machinen.no-such-key=1", &["io.machinen.no-such-key"]),
    ] {
        let run = containerd.run(IMAGE, &["true"]).flags(&["--annotation", annotation]);
        fails_saying(containerd, &run, words)?;
    }
    let run =
        containerd.run(IMAGE, &["sh", "-c", "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo"]);
    let output = run
        .flags(&["--annotation", "io.machinen.vcpus=2", "--annotation", "io.machinen.memory-ceiling=300"])
        .ok()?;
    let (cpus, memory) = output.split_once('\n').context("no output")?;
    let kib: u64 = memory.split_whitespace().nth(1).context("no size")?.parse()?;
    ensure!(cpus == "2" && (200 << 10..300 << 10).contains(&kib), "{output}");
    Ok(())
}

fn annotations_of_the_default_configuration(containerd: &mut Containerd) -> Result<()> {
    let all_tests = Setup::new();
    containerd.configure(&Setup::of_user())?;
    for (annotation, words) in [
        ("io.machinen.kernel-args=quiet", &["io.machinen.kernel-args", "annotations.allow"][..]),
        ("io.machinen.vcpus=9", &["io.machinen.vcpus", "9", "annotations.max_vcpus", "8"]),
        ("io.machinen.rootdisk-size=16385", &["annotations.max_rootdisk_size_mib"]),
    ] {
        let run = containerd.run(IMAGE, &["true"]).flags(&["--annotation", annotation]);
        fails_saying(containerd, &run, words)?;
    }
    containerd.configure(&all_tests)
}

fn longest_names(containerd: &mut Containerd) -> Result<()> {
    // PATH_MAX is 4096 with the final NUL; components, hostnames and arguments have limits of their own.
    let path = format!("{}/bin/echo", "/.".repeat(2000));
    let argument = "a".repeat(128 << 10 >> 1);
    let output = containerd.run(IMAGE, &[&path, &argument]).ok()?;
    ensure!(output.trim_end() == argument, "an argument came as {} bytes", output.len());
    let name = "n".repeat(4096);
    let output = containerd.run(IMAGE, &["env"]).flag("--env").flag(format!("{name}={name}")).ok()?;
    ensure!(output.lines().any(|line| line == format!("{name}={name}")), "the variable did not come");
    let too_long = format!("/{}", "x".repeat(4096));
    fails_saying(containerd, &containerd.run(IMAGE, &[&too_long]), &["name too long"])?;
    works(containerd)
}
