//! The kernel's state of a process is the same after a restore.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
};
use serde_json::json;

use super::checkpoint;
use crate::harness::on_newest_containerd;

on_newest_containerd!(privileges_and_limits);

/// Everything of the container's first process that an administrator may have set.
const LOOK: &str = "grep -v -e ctxt -e '^FDSize' -e '^Vm' -e '^Rss' -e '^Hugetlb' -e '^State' -e '^THP' -e '^untag' -e '^x86_' /proc/1/status; \
                    cat /proc/1/limits /proc/1/oom_score_adj /proc/1/cgroup; hostname; \
                    cd /sys/fs/cgroup; for f in memory.max memory.swap.max memory.low cpu.max cpu.weight pids.max \
                    cgroup.freeze; do echo $f $(cat $f); done; readlink /proc/1/cwd /proc/1/exe; \
                    tr '\\0' '\\n' </proc/1/environ; grep -c . /proc/1/mountinfo";

fn privileges_and_limits(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["sleep", "1000"], |spec| {
        let process = &mut spec["process"];
        process["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [29, 50], "umask": 23});
        process["cwd"] = json!("/home/alice");
        process["env"] = json!(["PATH=/bin", "B=2", "A=1"]);
        process["noNewPrivileges"] = json!(true);
        process["oomScoreAdj"] = json!(123);
        process["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 700, "hard": 900},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]);
        spec["hostname"] = json!("kept-name");
        spec["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({"type": "cgroup"}));
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 100 << 20, "reservation": 10 << 20},
            "cpu": {"quota": 70000, "period": 100_000, "shares": 500},
            "pids": {"limit": 77},
        });
        spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/keys", "/proc/acpi", "/sys/firmware"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/bus", "/proc/sys"]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdirat", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        });
        let mounts = spec["mounts"].as_array_mut().expect("an array");
        mounts.push(mount("/sys/fs/cgroup", "cgroup2", "cgroup", &["ro", "nosuid", "noexec", "nodev"]));
        mounts.push(mount("/run", "tmpfs", "tmpfs", &["nosuid", "size=1m"]));
    })?;
    let source = Served::run(containerd, &config)?;
    let look = |served: &Served<'_>, name: &str| -> Result<String> {
        let path = containerd.root().join(name);
        let status = served.exec_to("look", &["sh", "-c", LOOK], &format!("file://{}", path.display()))?;
        ensure!(status == 0, "{name}: status {status}: {}", fs::read_to_string(&path)?);
        let text = fs::read_to_string(&path)?;
        fs::remove_file(&path)?;
        Ok(text)
    };
    let before = look(&source, "before")?;
    for set in
        ["NoNewPrivs:\t1", "Seccomp:\t2", "memory.max 104857600", "pids.max 77", "kept-name", "700", "123"]
    {
        ensure!(before.contains(set), "{set:?} was not set:\n{before}");
    }
    let dir = containerd.root().join("images");
    checkpoint(&source, &dir)?;
    source.end()?;
    let restored = Served::restored(containerd, &config, &dir)?;
    let after = look(&restored, "after")?;
    let differs: Vec<_> =
        before.lines().zip(after.lines()).filter(|(before, after)| before != after).collect();
    ensure!(
        differs.is_empty() && before.lines().count() == after.lines().count(),
        "{differs:#?}\n{before}\n{after}"
    );
    restored.end()?;
    Ok(fs::remove_dir_all(&dir)?)
}
