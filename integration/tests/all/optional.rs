//! Members of a configuration that are absent, null or empty, and odd ones: each is served or refused as by
//! runc.
//!
//! All variants are made from one complete configuration. Variants that are the same for the guest run only
//! once, and many share a VM. Where machinen differs from runc on purpose, [`DIFFERENCES`] gives the reason.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen::spec::{bundle, guest};
use machinen_integration::{
    bundle::Bundle,
    containerd::Containerd,
    process::Invocation,
    served::Served,
    setup::{Setup, Value as Key},
};
use serde_json::{Map, Value, json};

use crate::harness::{NEWEST, run_with};

/// A configuration without a network namespace is one of the variants.
fn setup() -> Setup {
    Setup::new().set("network", "host", Key::text("loopback"))
}

#[test]
fn on_the_newest_containerd() {
    run_with(NEWEST, &setup(), optional_members_may_be_absent_null_or_empty);
}

#[test]
fn odd_ones_on_the_newest_containerd() {
    run_with(NEWEST, &setup(), odd_members_are_as_with_runc);
}

/// Variants with a name of this prefix differ from runc, for the reason given.
const DIFFERENCES: [(&str, &str); 11] = [
    (
        "linux.devices.0.major",
        "runc makes a node for a device 0:229, which no kernel has; the VM's are known",
    ),
    ("linux.devices.0.minor", "runc makes a node for a device 10:0, which no kernel has; the VM's are known"),
    ("linux.devices.0.path", "runc makes no node and reports nothing; a device without a path is a mistake"),
    (
        "linux.resources.devices.1.allow",
        "a container that may not use /dev/null cannot make it either, in the engine's order",
    ),
    ("ociVersion = \"2.0.0\"", "runc looks at no version; what a later one would mean cannot be known"),
    ("linux.namespaces = []", "runc shares the host's mounts; every container of machinen's has its own"),
    (
        "linux.namespaces without mount",
        "runc shares the host's mounts; every container of machinen's has its own",
    ),
    ("linux.intelRdt", "runc 1.1 takes an empty one for none"),
    ("linux.namespaces with time", "runc 1.1 knows no time namespaces"),
    ("a cgroupsPath with ..", "runc resolves it; a path that leads up is refused by name"),
    ("linux.devices with a disk", "runc makes the node; the VM does not have the host's disks"),
];

/// Objects with keys of the caller's choice: no variants are made of their members.
const MAPS: [&str; 3] = ["annotations", "linux.sysctl", "linux.resources.rdma"];

/// A configuration with every member of the specification that both runc and a VM support.
fn complete(rootfs: &Path) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL"];
    let namespaces = ["pid", "mount", "ipc", "uts", "network"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "hostname": "box",
        "annotations": {"a": "b"},
        "process": {
            "terminal": false,
            "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [0, 10]},
            "args": ["true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "inheritable": capabilities, "ambient": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
            "apparmorProfile": "", "selinuxLabel": "",
            "oomScoreAdj": 100,
        },
        "root": {"path": rootfs, "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
        ],
        "hooks": {
            "prestart": [], "createRuntime": [], "createContainer": [], "startContainer": [], "poststart": [],
            "poststop": [],
        },
        "linux": {
            "namespaces": namespaces,
            "uidMappings": [], "gidMappings": [],
            "devices": [
                {"path": "/dev/mine", "type": "c", "major": 10, "minor": 229, "fileMode": 432, "uid": 0, "gid": 0},
            ],
            "cgroupsPath": "/machinen-test/optional",
            "sysctl": {"kernel.msgmax": "8192"},
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                ],
                "memory": {"limit": 67_108_864, "reservation": 33_554_432},
                "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
                "pids": {"limit": 100},
                "blockIO": {"weight": 100, "weightDevice": [], "throttleReadBpsDevice": []},
                "hugepageLimits": [], "network": {"priorities": []}, "rdma": {}, "unified": {},
            },
            "rootfsPropagation": "private",
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "flags": [],
                "syscalls": [{
                    "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                    "args": [{"index": 0, "value": 7, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
                }],
            },
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "mountLabel": "",
        },
    })
}

struct Variant {
    name: String,
    config: Value,
}

/// For each member at any depth: without it, with null, and with an empty one of its type. Of the elements of
/// a list, the last one's members.
fn variants(complete: &Value) -> Vec<Variant> {
    let mut found = Vec::new();
    collect(complete, complete, "", &mut found);
    found
}

fn collect(complete: &Value, at: &Value, pointer: &str, found: &mut Vec<Variant>) {
    let name = pointer.trim_start_matches('/').replace('/', ".");
    match at {
        Value::Object(_) if MAPS.contains(&name.as_str()) => {}
        Value::Object(members) => {
            for (member, value) in members {
                let mut changed = |what: String, change: &dyn Fn(&mut Map<String, Value>)| {
                    let mut config = complete.clone();
                    let parent = config.pointer_mut(pointer).and_then(Value::as_object_mut);
                    change(parent.expect("the pointer was found"));
                    let dot = if name.is_empty() { "" } else { "." };
                    found.push(Variant { name: format!("{name}{dot}{member} {what}"), config });
                };
                changed("absent".to_owned(), &|parent| drop(parent.remove(member)));
                for new in [Some(Value::Null), empty_like(value)].into_iter().flatten() {
                    let insert =
                        |parent: &mut Map<String, Value>| drop(parent.insert(member.clone(), new.clone()));
                    changed(format!("= {new}"), &insert);
                }
                collect(complete, value, &format!("{pointer}/{member}"), found);
            }
        }
        Value::Array(elements) => {
            if let Some(last) = elements.last().filter(|last| last.is_object()) {
                collect(complete, last, &format!("{pointer}/{}", elements.len() - 1), found);
            }
        }
        _ => {}
    }
}

/// The empty value of the same type; none if the value is empty already or its type has no empty value.
fn empty_like(value: &Value) -> Option<Value> {
    let empty = match value {
        Value::String(_) => json!(""),
        Value::Array(_) => json!([]),
        Value::Object(_) => json!({}),
        _ => return None,
    };
    (empty != *value).then_some(empty)
}

/// A VM keeps the disks of its containers until it ends, and has room for those of about a hundred.
const PER_VM: usize = 80;

/// Runs configurations with runc, and in VMs that many share.
struct Both<'a> {
    containerd: &'a Containerd,
    /// The container that keeps the VM.
    idle: Served<'a>,
    bundle: Bundle,
    runs: usize,
    /// The outcome of a configuration for the guest.
    seen: HashMap<String, Result<(), String>>,
    differences: Vec<String>,
    used: Vec<&'static str>,
}

impl<'a> Both<'a> {
    fn new(containerd: &'a Containerd) -> Result<Self> {
        let (idle, bundle) = (Served::idle(containerd)?, Bundle::busybox(containerd)?);
        let (seen, differences, used) = (HashMap::new(), Vec::new(), Vec::new());
        Ok(Self { containerd, idle, bundle, runs: 0, seen, differences, used })
    }

    /// Notes the variant if one of the two serves it and the other does not.
    fn compare(&mut self, Variant { name, config }: &Variant) -> Result<()> {
        let path = self.bundle.config_text(&config.to_string())?;
        let runc = with_runc(&path)?;
        let ours = self.with_machinen(&path)?;
        if runc.is_ok() == ours.is_ok() {
            return Ok(());
        }
        match DIFFERENCES.iter().find(|(begins, _)| name.starts_with(begins)) {
            Some((begins, _)) => self.used.push(begins),
            None => self.differences.push(format!("{name}\n    runc: {runc:?}\n    machinen: {ours:?}")),
        }
        Ok(())
    }

    fn with_machinen(&mut self, config: &Path) -> Result<Result<(), String>> {
        let text = fs::read(config)?;
        let reduced = bundle::parse(&text, "config.json".into())
            .map_err(|error| error.to_string())
            .and_then(|spec| guest::reduce(spec, "c").map_err(|error| error.to_string()));
        let key = match reduced {
            Ok(reduced) => serde_json::to_string(&reduced.for_vm(1))?,
            // The shim must decide the same.
            Err(error) => error,
        };
        if let Some(seen) = self.seen.get(&key) {
            return Ok(seen.clone());
        }
        let outcome = self.run(config)?;
        self.seen.insert(key, outcome.clone());
        Ok(outcome)
    }

    fn run(&mut self, config: &Path) -> Result<Result<(), String>> {
        self.runs += 1;
        if self.runs.is_multiple_of(PER_VM) {
            let used = std::mem::replace(&mut self.idle, Served::idle(self.containerd)?);
            used.end()?;
        }
        let served = self.idle.in_same_vm(self.containerd, config)?;
        let created =
            served.client.call::<api::CreateTaskResponse>("Create", &served.shim.create_request())?;
        let outcome = match created {
            Err((_, message)) => Err(message),
            Ok(_) => {
                let started = served.client.call::<api::StartResponse>("Start", &served.start(""))?;
                let status = served.wait("")?.exit_status;
                served.client.ok::<api::DeleteResponse>("Delete", &served.delete(""))?;
                match started {
                    Err((_, message)) => Err(message),
                    Ok(_) if status != 0 => Err(format!("exit status {status}")),
                    Ok(_) => Ok(()),
                }
            }
        };
        fs::remove_dir_all(&served.shim.bundle)?;
        Ok(outcome)
    }

    fn finish(self, known: &[&'static str]) -> Result<()> {
        self.idle.end()?;
        ensure!(
            self.differences.is_empty(),
            "{} variants are not as with runc:\n{}",
            self.differences.len(),
            self.differences.join("\n")
        );
        let stale: Vec<_> = known.iter().filter(|begins| !self.used.contains(begins)).collect();
        ensure!(stale.is_empty(), "these are as with runc: {stale:?}");
        Ok(())
    }
}

/// Runs the bundle of that configuration to its end.
fn with_runc(config: &Path) -> Result<Result<(), String>> {
    let dir: PathBuf = config.parent().context("a file is in a directory")?.into();
    let state = dir.join("runc");
    // Without a mount namespace, runc would mount /proc and /dev on the host.
    let runc = |args: &[&str]| {
        Invocation::new("unshare").args(["--mount", "runc", "--root"]).arg(&state).args(args).run()
    };
    let bundle = dir.display().to_string();
    let id = format!("machinen-test-{}", std::process::id());
    let output = runc(&["run", "--bundle", &bundle, &id])?;
    runc(&["delete", "--force", &id])?;
    Ok(if output.status == 0 { Ok(()) } else { Err(output.error_text()) })
}

fn optional_members_may_be_absent_null_or_empty(containerd: &mut Containerd) -> Result<()> {
    let mut both = Both::new(containerd)?;
    let complete = complete(&both.bundle.rootfs());
    let path = both.bundle.config_text(&complete.to_string())?;
    ensure!(with_runc(&path)? == Ok(()), "runc runs the complete configuration: {:?}", with_runc(&path)?);
    ensure!(both.with_machinen(&path)? == Ok(()), "{:?}", both.with_machinen(&path)?);
    for variant in variants(&complete) {
        both.compare(&variant).with_context(|| variant.name.clone())?;
    }
    both.finish(&[])
}

fn odd_members_are_as_with_runc(containerd: &mut Containerd) -> Result<()> {
    let mut both = Both::new(containerd)?;
    let complete = complete(&both.bundle.rootfs());
    for (name, pointer, value) in odd_members() {
        let mut config = complete.clone();
        let (parent, member) = pointer.rsplit_once('/').context("a pointer has a slash")?;
        let parent = config.pointer_mut(parent).with_context(|| format!("{name}: no {parent}"))?;
        match parent {
            Value::Array(elements) => elements.push(value),
            parent => parent[member] = value,
        }
        if name == "linux absent, without what it would need" {
            let members = config.as_object_mut().context("an object")?;
            members.retain(|member, _| !matches!(member.as_str(), "linux" | "hostname"));
        }
        both.compare(&Variant { name: name.to_owned(), config }).with_context(|| name.to_owned())?;
    }
    let always: Vec<_> =
        DIFFERENCES.iter().map(|(begins, _)| *begins).filter(|begins| is_always(begins)).collect();
    both.finish(&always)
}

/// Versions of runc differ in the others.
fn is_always(begins: &str) -> bool {
    begins.starts_with("ociVersion") || begins == "linux.devices with a disk"
}

/// A name, where the member is (`-`: added to the list), and its value.
fn odd_members() -> Vec<(&'static str, &'static str, Value)> {
    let kinds = |kinds: &[&str]| kinds.iter().map(|kind| json!({"type": kind})).collect::<Value>();
    let cpu = |value: &str| json!({"cpus": value});
    vec![
        ("ociVersion = \"2.0.0\"", "/ociVersion", json!("2.0.0")),
        ("ociVersion = \"1.3.0\"", "/ociVersion", json!("1.3.0")),
        ("unknown members", "/frobnicate", json!({"a": [1]})),
        ("unknown members of the process", "/process/frobnicate", json!({"a": [1]})),
        ("an annotation that is null", "/annotations/x", json!(null)),
        ("process.cwd is relative", "/process/cwd", json!("tmp")),
        ("process.args has an empty command", "/process/args", json!([""])),
        ("process.args ends with null", "/process/args", json!(["true", null])),
        ("process.env with null", "/process/env/-", json!(null)),
        ("process.env with an empty text", "/process/env/-", json!("")),
        ("process.env without a value", "/process/env/-", json!("NAME")),
        ("process.env without a name", "/process/env/-", json!("=value")),
        ("process.env with an empty value", "/process/env/-", json!("NAME=")),
        (
            "unknown capabilities",
            "/process/capabilities/bounding",
            json!(["CAP_CHOWN", "CAP_KILL", "CAP_NEW", "chown"]),
        ),
        ("no capabilities", "/process/capabilities", json!(null)),
        (
            "a limit that comes twice",
            "/process/rlimits/-",
            json!({"type": "RLIMIT_NOFILE", "hard": 99, "soft": 99}),
        ),
        ("an unknown limit", "/process/rlimits/-", json!({"type": "RLIMIT_X", "hard": 99, "soft": 99})),
        ("oomScoreAdj out of bounds", "/process/oomScoreAdj", json!(1001)),
        ("a negative size of the console", "/process/consoleSize", json!({"height": -1})),
        ("a mount without a source", "/mounts/-", json!({"destination": "/scratch", "type": "tmpfs"})),
        ("a mount at a relative place", "/mounts/-", json!({"destination": "scratch", "type": "tmpfs"})),
        ("a mount that is null", "/mounts/-", json!(null)),
        (
            "a mount with an unknown option",
            "/mounts/-",
            json!({"destination": "/s", "type": "tmpfs", "options": ["x"]}),
        ),
        ("linux absent, without what it would need", "/annotations/x", json!("")),
        ("linux.namespaces = []", "/linux/namespaces", json!([])),
        ("linux.namespaces without mount", "/linux/namespaces", kinds(&["pid", "ipc", "uts", "network"])),
        ("a namespace that comes twice", "/linux/namespaces/-", json!({"type": "pid"})),
        ("an unknown namespace", "/linux/namespaces/-", json!({"type": "x"})),
        ("linux.namespaces with time", "/linux/namespaces/-", json!({"type": "time"})),
        ("a relative cgroupsPath", "/linux/cgroupsPath", json!("machinen-test/relative")),
        ("a cgroupsPath with ..", "/linux/cgroupsPath", json!("/machinen-test/../machinen-test/x")),
        ("seccomp = {}", "/linux/seccomp", json!({})),
        ("seccomp without architectures", "/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW"})),
        ("seccomp with an unknown architecture", "/linux/seccomp/architectures/-", json!("SCMP_ARCH_X")),
        (
            "seccomp with an unknown system call",
            "/linux/seccomp/syscalls/-",
            json!({"names": ["nonesuch"], "action": "SCMP_ACT_ERRNO"}),
        ),
        (
            "seccomp for no system call",
            "/linux/seccomp/syscalls/-",
            json!({"names": [], "action": "SCMP_ACT_ERRNO"}),
        ),
        ("an empty masked path", "/linux/maskedPaths", json!([""])),
        ("a relative masked path", "/linux/maskedPaths", json!(["proc/kcore"])),
        ("an unknown propagation", "/linux/rootfsPropagation", json!("x")),
        ("linux.intelRdt", "/linux/intelRdt", json!({})),
        (
            "linux.devices with a disk",
            "/linux/devices/-",
            json!({"path": "/dev/sdx", "type": "b", "major": 8, "minor": 0}),
        ),
        ("linux.devices with a fifo", "/linux/devices/-", json!({"path": "/dev/f", "type": "p"})),
        ("an invalid CPU", "/linux/resources/cpu", cpu("a")),
        ("CPUs in the wrong order", "/linux/resources/cpu", cpu("5-2")),
        ("CPUs without an end", "/linux/resources/cpu", cpu("1-")),
        ("CPUs beyond all", "/linux/resources/cpu", cpu("0-99999999999")),
        ("CPUs that are a comma", "/linux/resources/cpu", cpu(",")),
        ("CPUs with blanks", "/linux/resources/cpu", cpu(" 0 ,")),
        ("CPUs with a pattern", "/linux/resources/cpu", cpu("0-0:1/2")),
        ("an invalid node", "/linux/resources/cpu", json!({"mems": "a"})),
        ("no quota and no period", "/linux/resources/cpu", json!({"quota": -1, "period": 0})),
        ("all zero", "/linux/resources/cpu", json!({"shares": 0, "quota": 0, "period": 0})),
        ("no memory limit", "/linux/resources/memory", json!({"limit": -1, "swap": -1})),
        ("memory limits of zero", "/linux/resources/memory", json!({"limit": 0, "reservation": 0})),
        ("pids without a limit", "/linux/resources/pids", json!({})),
        (
            "huge pages of an odd size",
            "/linux/resources/hugepageLimits",
            json!([{"pageSize": "3MB", "limit": 1}]),
        ),
    ]
}
