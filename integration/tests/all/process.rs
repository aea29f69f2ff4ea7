//! The effects of a specification (config.json) on the process, seen from inside the container.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, ensure};
use machinen_integration::{bundle::Bundle, containerd::Containerd};
use serde_json::json;

use crate::harness::on_newest_containerd;

on_newest_containerd!(
    arguments_and_environment,
    user_groups_umask_and_directory,
    privileges,
    limits,
    names_and_namespaces,
);

fn arguments_and_environment(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let words = ["", "two words", "tab\tand\nline", "ünïcödé", "$HOME `id` \"quoted\" \\"];
    let command = [&["sh", "-c", "printf '<%s>' \"$@\"; echo; env", "name"], &words[..]].concat();
    let config = bundle.config(&command, |spec| {
        spec["process"]["env"] = json!(["PATH=/bin", "EMPTY=", "SPACES=a  b", "TWICE=first", "TWICE=second"]);
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    let wanted: String = words.iter().map(|word| format!("<{word}>")).collect();
    let (arguments, environment) = seen.split_at_checked(wanted.len()).context("too little output")?;
    ensure!(arguments == wanted, "{seen}");
    for line in ["PATH=/bin", "EMPTY=", "SPACES=a  b"] {
        ensure!(environment.lines().any(|seen| seen == line), "no {line} in\n{environment}");
    }
    Ok(())
}

fn user_groups_umask_and_directory(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "id -u; id -g; id -G; umask; pwd; cat /etc/secret; touch /etc/x; echo $? $HOME";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["process"]["user"] =
            json!({ "uid": 1000, "gid": 1000, "additionalGids": [50, 29], "umask": 0o027 });
        spec["process"]["cwd"] = json!("/home/alice");
        spec["process"]["env"] = json!(["PATH=/bin", "HOME=/home/alice"]);
    })?;
    let output = containerd.run_spec(&config).output()?;
    let seen = output.text();
    let [uid, gid, groups, umask, directory, home] = seen.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("odd output: {output}")
    };
    ensure!((uid, gid, umask, directory) == ("1000", "1000", "0027", "/home/alice"), "{output}");
    let mut groups: Vec<&str> = groups.split(' ').collect();
    groups.sort_unstable();
    ensure!(groups == ["1000", "29", "50"], "groups are {groups:?}");
    ensure!(home == "1 /home/alice", "an unprivileged user wrote to /etc: {output}");
    ensure!(output.error_text().contains("/etc/secret"), "an unprivileged user read /etc/secret: {output}");
    Ok(())
}

/// `/proc/self/status` as the container's process sees it.
fn status(containerd: &Containerd, config: &std::path::Path) -> Result<BTreeMap<String, String>> {
    let text = containerd.run_spec(config).ok()?;
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    Ok(pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

fn privileges(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let command = ["cat", "/proc/self/status", "/proc/self/oom_score_adj"];
    let config = bundle.config(&command, |spec| {
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"],
            "effective": ["CAP_KILL", "CAP_CHOWN"],
            "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"],
            "inheritable": ["CAP_NET_BIND_SERVICE"],
            "ambient": ["CAP_NET_BIND_SERVICE"],
        });
        spec["process"]["noNewPrivileges"] = json!(true);
    })?;
    let seen = status(containerd, &config)?;
    // CAP_CHOWN is bit 0, CAP_KILL 5, CAP_NET_BIND_SERVICE 10; the bounding set limits what root gets by
    // execve.
    for (name, value) in [("CapBnd", "421"), ("CapPrm", "421"), ("CapInh", "400"), ("CapAmb", "400")] {
        ensure!(seen[name] == format!("{value:0>16}"), "{name} is {}", seen[name]);
    }
    ensure!(seen["NoNewPrivs"] == "1", "no_new_privs is {}", seen["NoNewPrivs"]);

    let config = bundle.config(&command, |spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["capabilities"] = json!({});
    })?;
    let seen = status(containerd, &config)?;
    ensure!(seen["NoNewPrivs"] == "0", "no_new_privs is {}", seen["NoNewPrivs"]);
    for name in ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"] {
        ensure!(seen[name] == "0".repeat(16), "{name} is {}", seen[name]);
    }
    Ok(())
}

fn limits(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let config = bundle.config(&["cat", "/proc/self/limits", "/proc/self/oom_score_adj"], |spec| {
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 77, "hard": 88 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            { "type": "RLIMIT_NPROC", "soft": 999, "hard": 1999 },
        ]);
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    let fields = |name: &str| -> Vec<String> {
        let line = seen.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().take(2).map(str::to_owned).collect()
    };
    ensure!(fields("Max open files") == ["77", "88"], "{seen}");
    ensure!(fields("Max core file size") == ["0", "0"], "{seen}");
    ensure!(fields("Max processes") == ["999", "1999"], "{seen}");
    ensure!(seen.lines().last() == Some("321"), "{seen}");
    Ok(())
}

fn names_and_namespaces(containerd: &mut Containerd) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    let script = "hostname; echo $$; ls /proc | grep -c '^[0-9]'; cat /proc/sys/kernel/domainname; \
                  readlink /proc/self/ns/uts; ls /dev/mqueue | wc -l";
    let config = bundle.config(&["sh", "-c", script], |spec| {
        spec["hostname"] = json!("a-name.of-its-own");
    })?;
    let seen = containerd.run_spec(&config).ok()?;
    let [hostname, pid, processes, _, uts, _] = seen.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("odd output:\n{seen}")
    };
    ensure!(hostname == "a-name.of-its-own", "the hostname is {hostname}");
    ensure!(pid == "1", "the container's process has the pid {pid}");
    // sh, ls and grep: no process of the guest or the host.
    ensure!(processes.parse::<u32>()? <= 3, "{processes} processes are visible");
    let host = fs::read_link("/proc/self/ns/uts")?;
    ensure!(host.to_str() != Some(uts), "the container is in the host's namespace {uts}");
    Ok(())
}
