//! Options of `podman run`.

use anyhow::{Result, ensure};
use machinen_integration::{
    podman::{Podman, PodmanCommands as _},
    runtime::Runtime,
};

use super::{IMAGE, script, with_podman};

with_podman!(
    limits,
    identity,
    privileges,
    seccomp,
    an_init_process,
    read_only,
    user_namespace,
    podmans_own_files
);

/// Runs a script, and compares what it prints.
fn prints(podman: &Podman, flags: &[&str], text: &str, wanted: &str) -> Result<()> {
    let output = script(podman, flags, text)?;
    ensure!(output == wanted, "{flags:?}: {output}");
    Ok(())
}

/// The files of either version of cgroups.
fn limits(podman: &Podman) -> Result<()> {
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
    prints(podman, &flags, script, "67108864\n50000\n50\n100\n200\n0")
}

fn identity(podman: &Podman) -> Result<()> {
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
        "--sysctl",
        "net.ipv4.ip_forward=1",
    ];
    let script = "id -u; id -g; id -G; pwd; echo $NAME; hostname; cat /proc/sys/net/ipv4/ip_forward";
    prints(podman, &flags, script, "7\n8\n8 9\n/tmp\na b\nhost\n1")?;
    prints(podman, &["--entrypoint", "echo", "--env", "NAME=x"], "y", "sh -c y")
}

fn privileges(podman: &Podman) -> Result<()> {
    let caps = "grep CapEff /proc/self/status | cut -f 2; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status | cut -f 2";
    prints(podman, &[], caps, "00000000800405fb\n0\n2")?;
    let flags = ["--cap-drop", "ALL", "--cap-add", "CHOWN", "--security-opt", "no-new-privileges"];
    prints(podman, &flags, caps, "0000000000000001\n1\n2")?;
    let script = "mkdir /m && mount -t tmpfs none /m && echo mounted; test -e /dev/fuse && echo device; \
                  grep Seccomp: /proc/self/status | cut -f 2";
    prints(podman, &["--privileged"], script, "mounted\ndevice\n0")?;
    let script =
        "test -c /dev/fuse && echo device; echo x 2> /dev/null > /proc/sys/kernel/hostname || echo refused";
    prints(podman, &["--device", "/dev/fuse"], script, "device\nrefused")
}

fn seccomp(podman: &Podman) -> Result<()> {
    let profile = podman.dir().join("profile.json");
    std::fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#,
    )?;
    let profile = format!("seccomp={}", profile.display());
    prints(
        podman,
        &["--security-opt", &profile],
        "mkdir /made 2>&1 | grep -o 'No space left on device'; touch /t && echo touched",
        "No space left on device\ntouched",
    )?;
    prints(
        podman,
        &["--security-opt", "seccomp=unconfined"],
        "grep Seccomp: /proc/self/status | cut -f 2",
        "0",
    )
}

/// It reaps the orphans.
fn an_init_process(podman: &Podman) -> Result<()> {
    let script = "tr '\\0' '\\n' < /proc/1/cmdline | head -n 1; (sh -c 'sleep 0 & exec true') ; sleep 0.5; ps | grep -c '[ ]Z '; true";
    prints(podman, &["--init"], script, "/run/podman-init\n0")
}

fn read_only(podman: &Podman) -> Result<()> {
    let script = "echo x > /file 2> /dev/null || echo read-only; echo y > /scratch/file; \
                  grep -o ' /scratch tmpfs rw,nosuid,nodev' /proc/mounts; df -k /scratch | awk 'END {print $2}'; \
                  stat -f -c '%b blocks of %S' /dev/shm";
    let flags = ["--read-only", "--tmpfs", "/scratch:size=1m", "--shm-size", "2m"];
    prints(podman, &flags, script, "read-only\n /scratch tmpfs rw,nosuid,nodev\n1024\n512 blocks of 4096")
}

fn user_namespace(podman: &Podman) -> Result<()> {
    let flags = ["--uidmap", "0:100000:1000", "--gidmap", "0:200000:1000"];
    let script = "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map; stat -c %u /bin/busybox; id -u; touch /new && stat -c %u /new";
    if podman.runtime() == Runtime::Runc {
        return prints(podman, &flags, script, " 0 100000 1000\n 0 200000 1000\n0\n0\n0");
    }
    // Podman maps the image's files to other users of the host, as whom machinen cannot read them.
    let args = [&["run", "--rm", "--network", "none"], &flags[..], &[IMAGE, "sh", "-c", script]].concat();
    let refused = podman.output(&args)?;
    let named = refused.error_text().contains("cannot convert the rootfs to a disk");
    ensure!(refused.status != 0 && named, "{refused}");
    Ok(())
}

/// /etc/hosts, /etc/hostname and /etc/resolv.conf are files of the host that Podman makes.
fn podmans_own_files(podman: &Podman) -> Result<()> {
    let flags = ["run", "--rm", "--hostname", "named", "--add-host", "there:10.1.2.3", "--dns", "10.0.0.53"];
    let script = "cat /etc/hostname; awk '$2 == \"there\" {print $1}' /etc/hosts; grep -v '^#' /etc/resolv.conf | sort; \
                  grep -c engine= /run/.containerenv";
    let more = ["--dns-search", "example.org", "--privileged", IMAGE, "sh", "-c", script];
    let output = podman.ok(&[&flags[..], &more].concat())?;
    let lines: Vec<_> = output.lines().filter(|line| !line.is_empty()).collect();
    ensure!(lines == ["named", "10.1.2.3", "nameserver 10.0.0.53", "search example.org", "1"], "{output}");
    Ok(())
}
