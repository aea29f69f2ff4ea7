//! Options of `docker run`.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{
    cri::OTHER_CONFIGURATION,
    docker::{Docker, MACHINEN_OTHER},
    setup::{Setup, Value},
};

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(runc, RUNC: limits, identity, privileges, an_init_process, a_terminal);
with_docker!(
    machinen, MACHINEN: limits, identity, privileges, an_init_process, a_terminal, a_configuration_of_its_own
);

/// Runs a script, and compares what it prints.
fn prints(docker: &Docker<'_>, runtime: &str, flags: &[&str], script: &str, wanted: &str) -> Result<()> {
    let args =
        [&["run", "--rm", "--runtime", runtime, "--network", "none"], flags, &[IMAGE, "sh", "-c", script]]
            .concat();
    let output = docker.ok(&args)?;
    ensure!(output == wanted, "{flags:?}: {output}");
    Ok(())
}

/// A runtime of daemon.json with a file of its own.
fn a_configuration_of_its_own(docker: &Docker<'_>, _: &str) -> Result<()> {
    let args = ["run", "--rm", "--runtime", MACHINEN_OTHER, "--network", "none", IMAGE, "sh", "-c"];
    let args = [&args[..], &["awk '/^MemTotal/ { print $2 < 300 * 1024 }' /proc/meminfo"]].concat();
    let missing = docker.output(&args)?;
    let text = missing.error_text();
    ensure!(missing.status != 0 && text.contains("cannot read the configuration file"), "{missing}");
    ensure!(text.contains(OTHER_CONFIGURATION), "{missing}");
    let small = Setup::new().set("vm", "memory_mib", Value::number(300));
    let file = docker.containerd().configuration(OTHER_CONFIGURATION, &small)?;
    let printed = docker.ok(&args)?;
    ensure!(printed == "1", "the file has no effect: {printed}");
    Ok(fs::remove_file(file)?)
}

/// The files of either version of cgroups.
fn limits(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let flags = [
        "--memory",
        "64m",
        "--cpus",
        "0.5",
        "--pids-limit",
        "50",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
    ];
    let script = "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2> /dev/null; \
                  cut -d ' ' -f 1 cpu.max cpu/cpu.cfs_quota_us 2> /dev/null; cat pids.max pids/pids.max 2> /dev/null; \
                  ulimit -n; ulimit -H -n; ulimit -c";
    prints(docker, runtime, &flags, script, "67108864\n50000\n50\n100\n200\n0")
}

fn identity(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let flags = [
        "--user",
        "7:8",
        "--group-add",
        "9",
        "--workdir",
        "/tmp",
        "--env",
        "NAME=a b",
        "--hostname",
        "host",
        "--domainname",
        "example.org",
        "--label",
        "a=b",
        "--sysctl",
        "net.ipv4.ip_forward=1",
    ];
    let script = "id -u; id -g; id -G; pwd; echo $NAME; hostname; cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_forward";
    prints(docker, runtime, &flags, script, "7\n8\n8 9\n/tmp\na b\nhost\nexample.org\n1")?;
    prints(docker, runtime, &["--entrypoint", "echo"], "x", "sh -c x")
}

fn privileges(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let caps = "grep CapEff /proc/self/status | cut -f 2; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status | cut -f 2";
    prints(docker, runtime, &[], caps, "00000000a80425fb\n0\n2")?;
    let flags = ["--cap-drop", "ALL", "--cap-add", "CHOWN", "--security-opt", "no-new-privileges"];
    prints(docker, runtime, &flags, caps, "0000000000000001\n1\n2")?;
    let seccomp = "grep Seccomp: /proc/self/status | cut -f 2";
    prints(docker, runtime, &["--security-opt", "seccomp=unconfined"], seccomp, "0")?;
    let script = "mkdir /m && mount -t tmpfs none /m && echo mounted; test -e /dev/fuse && echo device";
    prints(docker, runtime, &["--privileged"], script, "mounted\ndevice")?;
    let script =
        "test -c /dev/fuse && echo device; echo x 2> /dev/null > /proc/sys/kernel/hostname || echo refused";
    prints(docker, runtime, &["--device", "/dev/fuse"], script, "device\nrefused")
}

fn an_init_process(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    prints(docker, runtime, &["--init"], "cat /proc/1/comm", "docker-init")
}

fn a_terminal(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    prints(docker, runtime, &["--tty"], "test -t 0 -a -t 1 && tty", "/dev/pts/0")
}
