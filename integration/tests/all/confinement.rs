//! The environment of the process that a specification describes: mounts, devices, sysctls, seccomp, limits.

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
};
use serde_json::{Value, json};

use crate::harness::{IMAGE, on_newest_containerd};

on_newest_containerd!(
    mounts_and_their_options,
    hidden_and_read_only_paths,
    read_only_root,
    devices,
    privileged,
    the_vm_is_hidden,
    clocks_of_its_own,
    sysctls,
    system_calls,
    group_limits,
    memory_limit_kills,
);

fn mounts_and_their_options(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "awk '{ print $2, $3, \",\" $4 \",\" }' /proc/mounts; stat -c %a /scratch; \
                  cp /bin/true /scratch/true && /scratch/true; echo $?; touch /fixed/x; echo $?; \
                  readlink /dev/fd; readlink /dev/stdin; readlink /dev/ptmx; ls /data/inner";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/scratch", "tmpfs", "tmpfs", &["noexec", "nosuid", "mode=700", "size=8m"]));
        // The image contains neither of the two.
        mounts.push(mount("/data/inner", "tmpfs", "tmpfs", &["nodev"]));
        mounts.push(mount("/fixed", "tmpfs", "tmpfs", &["ro"]));
    })?;
    let output = containerd.run_spec(&config).output()?;
    let seen = output.text();
    for (path, kind, options) in [
        ("/proc", "proc", &["nosuid", "noexec", "nodev"][..]),
        ("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", &["nosuid", "noexec", "ptmxmode=666"]),
        ("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "size=8192k"]),
        ("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", &["ro", "nosuid", "noexec", "nodev"]),
        ("/scratch", "tmpfs", &["rw", "nosuid", "noexec", "mode=700", "size=8192k"]),
        ("/data/inner", "tmpfs", &["nodev"]),
        ("/fixed", "tmpfs", &["ro"]),
    ] {
        let head = format!("{path} {kind} ");
        let line = seen.lines().find(|line| line.starts_with(&head));
        let line = line.with_context(|| format!("no {kind} at {path}: {output}"))?;
        for option in options {
            ensure!(line.contains(&format!(",{option},")), "no {option} on {line}");
        }
    }
    let tail: Vec<&str> = seen.lines().skip_while(|line| *line != "700").collect();
    ensure!(tail == ["700", "126", "1", "/proc/self/fd", "/proc/self/fd/0", "pts/ptmx"], "{output}");
    Ok(())
}

fn hidden_and_read_only_paths(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "wc -c < /etc/secret; ls /home | wc -l; ls /no/such; echo 1 > /proc/sys/vm/drop_caches; \
                  touch /root/x; touch /tmp/x && echo writable";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["linux"]["maskedPaths"] = json!(["/etc/secret", "/home", "/no/such"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/root", "/no/such/either"]);
    })?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.text() == "0\n0\nwritable\n", "{output}");
    let errors = output.error_text();
    ensure!(errors.contains("/proc/sys/vm/drop_caches: Read-only file system"), "{output}");
    ensure!(errors.contains("/root/x: Read-only file system"), "{output}");
    Ok(())
}

fn read_only_root(containerd: &mut Containerd) -> Result<()> {
    let script =
        "touch /x || touch /etc/passwd || rm /bin/sh || echo refused; echo y > /dev/shm/y; cat /dev/shm/y";
    let output = containerd.run(IMAGE, &["sh", "-c", script]).flag("--read-only").output()?;
    ensure!(output.text() == "refused\ny\n", "{output}");
    ensure!(output.error_text().matches("Read-only file system").count() == 3, "{output}");
    Ok(())
}

fn devices(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "cd /dev; stat -c '%n %a %u:%g %t:%T %F' null zero full random urandom tty mine; \
                  echo x > null && head -c 3 zero | wc -c && head -c 5 urandom | wc -c; echo x > full; \
                  mknod /tmp/disk b 8 0; ls | grep -c '^sd\\|^vd'";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["linux"]["devices"] =
            json!([{ "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8 }]);
    })?;
    let output = containerd.run_spec(&config).output()?;
    let special = "character special file";
    let wanted: String = [
        ("null", "1:3"),
        ("zero", "1:5"),
        ("full", "1:7"),
        ("random", "1:8"),
        ("urandom", "1:9"),
        ("tty", "5:0"),
    ]
    .iter()
    .map(|(name, number)| format!("{name} 666 0:0 {number} {special}\n"))
    .collect();
    let wanted = format!("{wanted}mine 640 7:8 1:5 {special}\n3\n5\n0\n");
    ensure!(output.text() == wanted, "wanted\n{wanted}got {output}");
    ensure!(output.error_text().contains("No space left on device"), "/dev/full is not full: {output}");
    ensure!(output.error_text().contains("/tmp/disk"), "a block device was made without CAP_MKNOD: {output}");
    Ok(())
}

/// `ctr run --privileged`: all capabilities, and all devices of the VM.
fn privileged(containerd: &mut Containerd) -> Result<()> {
    let script = "mknod /dev/log-of-the-kernel c 1 11 && echo x >/dev/log-of-the-kernel && mount -t tmpfs x /dev/shm && echo well";
    let run = |flags: &[&str]| {
        let run = containerd.run(IMAGE, &["sh", "-c", script]);
        flags.iter().fold(run, |run, flag| run.flag(flag)).output()
    };
    let output = run(&["--privileged"])?;
    ensure!(output.status == 0 && output.text() == "well\n", "{output}");
    let output = run(&[])?;
    ensure!(output.status != 0 && output.error_text().contains("log-of-the-kernel"), "{output}");
    Ok(())
}

/// See "What a container can see of its VM" in docs/design/guest.md.
fn the_vm_is_hidden(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // The descriptor is of the directory that is being read.
    let script = "dmesg | wc -l; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; set -- /proc/[0-9]*; echo $#; \
                  mknod /dev/disk b 8 0; cat /dev/disk | wc -c";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({"type": "cgroup"}));
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set].as_array_mut().expect("an array").push("CAP_MKNOD".into());
        }
        spec["linux"]["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "b", "access": "m"}]});
    })?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.text() == "0\n0::/\n4\n1\n0\n", "{output}");
    let errors = output.error_text();
    ensure!(errors.contains("klogctl") && errors.contains("/dev/disk"), "{output}");
    Ok(())
}

fn clocks_of_its_own(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let look = "cut -d. -f1 /proc/uptime; awk '{print $1, $2}' /proc/self/timens_offsets";
    let script = format!("({look}) >/seen.new; mv /seen.new /seen; while :; do sleep 1; done");
    let config = bundle.config(&["sh", "-c", &script], |spec| {
        spec["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({"type": "time"}));
        spec["linux"]["timeOffsets"] =
            json!({"boottime": {"secs": 864_000, "nanosecs": 0}, "monotonic": {"secs": 86400}});
    })?;
    let served = machinen_integration::served::Served::run(containerd, &config)?;
    let path = containerd.root().join("clocks");
    let script = format!("until [ -e /seen ]; do usleep 50000; done; cat /seen; {look}");
    let status = served.exec_to("look", &["sh", "-c", &script], &format!("file://{}", path.display()))?;
    let text = std::fs::read_to_string(&path)?;
    std::fs::remove_file(&path)?;
    ensure!(status == 0, "status {status}: {text}");
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == 6, "{text}");
    // The init's, then those of an added process.
    for clocks in lines.chunks(3) {
        let uptime: u64 = clocks[0].parse()?;
        ensure!((864_000..900_000).contains(&uptime), "{text}");
        ensure!(clocks[1..] == ["monotonic 86400", "boottime 864000"], "{text}");
    }
    served.end()
}

fn sysctls(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let files = ["/proc/sys/kernel/msgmax", "/proc/sys/net/ipv4/ip_unprivileged_port_start"];
    let config = bundle.config(&["cat", files[0], files[1]], |spec| {
        spec["linux"]["sysctl"] =
            json!({ "kernel.msgmax": "65530", "net.ipv4.ip_unprivileged_port_start": "99" });
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    ensure!(seen == "65530\n99\n", "{seen}");
    Ok(())
}

fn system_calls(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "grep Seccomp: /proc/self/status; mkdir /tmp/a; echo $?; sync; echo $?; chmod 600 /etc/passwd; echo done";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" },
                { "names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28 },
                // Names that this architecture or kernel does not have are not an error.
                { "names": ["no_such_call"], "action": "SCMP_ACT_ERRNO" },
            ],
        });
    })?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.text() == "Seccomp:\t2\n1\n0\ndone\n", "{output}");
    let errors = output.error_text();
    ensure!(errors.contains("Operation not permitted") && errors.contains("No space left"), "{output}");

    // The profile that containerd itself makes, a few hundred rules.
    let output = containerd.run(IMAGE, &["sh", "-c", "grep Seccomp: /proc/self/status; unshare -m true"]);
    let output = output.flag("--seccomp").output()?;
    ensure!(output.text() == "Seccomp:\t2\n" && output.status != 0, "{output}");
    Ok(())
}

fn resources(spec: &mut Value) -> &mut Value {
    &mut spec["linux"]["resources"]
}

fn group_limits(containerd: &mut Containerd) -> Result<()> {
    // Clients on a host with cgroup v1 ask for no cgroup namespace, and expect that the container sees its
    // own cgroup.
    let bundle = Bundle::busybox(containerd)?;
    for namespaces in [&[][..], &["cgroup"]] {
        group_limits_with(containerd, &bundle, namespaces)?;
    }
    Ok(())
}

fn group_limits_with(containerd: &Containerd, bundle: &Bundle, namespaces: &[&str]) -> Result<()> {
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.max cpu.weight; cat /proc/self/cgroup; \
                  touch x 2>/dev/null || echo read-only";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ));
        let more = namespaces.iter().map(|kind| json!({ "type": kind }));
        spec["linux"]["namespaces"].as_array_mut().expect("an array").extend(more);
        *resources(spec) = json!({
            "memory": { "limit": 100 << 20, "reservation": 50 << 20 },
            "pids": { "limit": 33 },
            "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000 },
        });
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    // Shares 1024 become weight 39 with runc's older formula and 100 with the newer one.
    let lines: Vec<&str> = seen.lines().collect();
    ensure!(lines[..4] == ["104857600", "52428800", "33", "50000 100000"], "{seen}");
    ensure!(["39", "100"].contains(&lines[4]), "{seen}");
    ensure!(lines[5..] == ["0::/", "read-only"], "{seen}");
    Ok(())
}

fn memory_limit_kills(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // tail keeps its whole last line in memory.
    let config = bundle.config(&["tail", "/dev/zero"], |spec| {
        *resources(spec) = json!({ "memory": { "limit": 32 << 20 } });
    })?;
    let output = containerd.run_spec(&config).output()?;
    ensure!(output.status == 137, "{output}");
    // The VM and its agent are unharmed: the next container starts as usual.
    let config = bundle.config(&["echo", "well"], |_| ())?;
    ensure!(containerd.run_spec(&config).ok()? == "well\n", "no second container");
    Ok(())
}
