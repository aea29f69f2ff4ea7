//! Normalises the JSON of a configuration as the programs that it is written for read it.
//!
//! containerd, its clients and runc are written in Go, whose decoder does not distinguish an absent member
//! from one that is null or (for a text) empty. Clients write any of the three for a value that they do not
//! set. Here all three become absent before any other code reads the configuration. The members of maps are
//! data, and are kept.

use serde_json::{Map, Value, json};

/// Paths of objects whose members have names chosen by the caller and texts as values.
const TEXT_MAPS: [&str; 3] = ["annotations", "linux.sysctl", "linux.resources.unified"];

/// Capabilities that the guest's kernel has (linux/capability.h).
pub(crate) const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Normalises a whole configuration.
pub(super) fn configuration(spec: &mut Value) {
    unset(spec, "");
    if let Some(process) = spec.get_mut("process") {
        complete_process(process);
    }
    let Some(linux) = spec.get_mut("linux") else { return };
    // A filter without an action, architectures and system calls filters nothing (runc's rule).
    let is_unset = |seccomp: &Value| {
        ["defaultAction", "architectures", "syscalls"].iter().all(|member| is_empty(&seccomp[member]))
    };
    if linux.get("seccomp").is_some_and(is_unset) {
        remove(linux, "seccomp");
    }
    complete_seccomp(linux);
}

/// Adds the default values of members that a rule of system calls leaves out.
fn complete_seccomp(linux: &mut Value) {
    let rules = linux.pointer_mut("/seccomp/syscalls").and_then(Value::as_array_mut);
    for rule in rules.into_iter().flatten().filter_map(Value::as_object_mut) {
        rule.entry("names").or_insert_with(|| json!([]));
        let args = rule.get_mut("args").and_then(Value::as_array_mut);
        for arg in args.into_iter().flatten().filter_map(Value::as_object_mut) {
            for number in ["index", "value"] {
                arg.entry(number).or_insert_with(|| json!(0));
            }
        }
    }
}

/// Normalises the process of a configuration, or one that is added.
pub(super) fn process(process: &mut Value) {
    unset(process, "process");
    complete_process(process);
}

/// Normalises the limits of an update.
pub(super) fn resources(resources: &mut Value) {
    unset(resources, "linux.resources");
}

/// Removes members that are null or empty texts, at all depths. `path` is the path of `value`, without
/// indices of arrays.
fn unset(value: &mut Value, path: &str) {
    match value {
        Value::Object(members) if TEXT_MAPS.contains(&path) => {
            members.values_mut().filter(|value| value.is_null()).for_each(|value| *value = json!(""));
        }
        Value::Object(members) => {
            members.retain(|_, value| !value.is_null() && value != "");
            for (name, value) in members {
                let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                unset(value, &below);
            }
        }
        Value::Array(elements) => elements.iter_mut().for_each(|element| unset(element, path)),
        _ => {}
    }
}

fn complete_process(process: &mut Value) {
    let Some(members) = process.as_object_mut() else { return };
    // A process without a user runs as root.
    members.entry("user").or_insert_with(|| json!({}));
    for list in ["args", "env"] {
        let texts = members.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten();
        texts.filter(|text| text.is_null()).for_each(|text| *text = json!(""));
    }
    if let Some(sets) = members.get_mut("capabilities").and_then(Value::as_object_mut) {
        // An absent set is empty; libcontainer would keep the set that the process has.
        for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            sets.entry(set).or_insert_with(|| json!([]));
        }
        drop_unknown_capabilities(sets);
    }
}

/// Drops unknown capabilities, as runc does: a list that was written for a newer kernel must not prevent a
/// start.
fn drop_unknown_capabilities(sets: &mut Map<String, Value>) {
    let mut unknown = Vec::new();
    for set in sets.values_mut().filter_map(Value::as_array_mut) {
        set.retain(|name| match name.as_str() {
            Some(text) if !CAPABILITIES.contains(&text) => {
                unknown.push(text.chars().take(80).collect::<String>());
                false
            }
            _ => true,
        });
    }
    unknown.sort();
    unknown.dedup();
    if !unknown.is_empty() {
        tracing::warn!("unknown capabilities are ignored: {}", unknown.join(", "));
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

fn remove(object: &mut Value, member: &str) {
    if let Some(members) = object.as_object_mut() {
        members.remove(member);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut spec: Value) -> Value {
        configuration(&mut spec);
        spec
    }

    #[test]
    fn absent_null_and_empty_are_the_same() {
        for unset in [
            json!({"mounts": [{"destination": "/a"}], "linux": {"namespaces": [{"type": "pid"}]}}),
            json!({
                "hostname": null, "hooks": null,
                "mounts": [{"destination": "/a", "type": null, "source": "", "options": null}],
                "linux": {"namespaces": [{"type": "pid", "path": ""}], "mountLabel": "", "seccomp": null},
            }),
            json!({
                "hostname": "",
                "mounts": [{"destination": "/a", "type": "", "source": null}],
                "linux": {
                    "namespaces": [{"type": "pid", "path": null}], "cgroupsPath": "", "rootfsPropagation": null,
                    "seccomp": {"defaultAction": "", "syscalls": []},
                },
            }),
        ] {
            let expected =
                json!({"mounts": [{"destination": "/a"}], "linux": {"namespaces": [{"type": "pid"}]}});
            assert_eq!(read(unset), expected);
        }
    }

    #[test]
    fn members_of_maps_keep_their_values() {
        let maps = json!({
            "annotations": {"a": "", "b": null},
            "linux": {"sysctl": {"kernel.x": ""}, "resources": {"unified": {"memory.high": ""}}},
        });
        let kept = read(maps);
        assert_eq!(kept["annotations"], json!({"a": "", "b": ""}));
        assert_eq!(kept["linux"]["sysctl"], json!({"kernel.x": ""}));
        assert_eq!(kept["linux"]["resources"]["unified"], json!({"memory.high": ""}));
    }

    #[test]
    fn a_process_has_a_user_and_known_capabilities() {
        let read = read(json!({"process": {
            "args": ["a", "", null],
            "env": [""],
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_NEW", "chown"], "effective": null, "permitted": []},
        }}));
        assert_eq!(
            read["process"],
            json!({
                "args": ["a", "", ""],
                "env": [""],
                "user": {},
                "capabilities": {
                    "bounding": ["CAP_CHOWN"], "effective": [], "permitted": [], "inheritable": [], "ambient": [],
                },
            })
        );
    }

    #[test]
    fn a_rule_of_system_calls_is_complete() {
        let rule = json!({"action": "SCMP_ACT_LOG", "args": [{"op": "SCMP_CMP_EQ", "value": null}]});
        let read =
            read(json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}}}));
        assert_eq!(
            read["linux"]["seccomp"]["syscalls"],
            json!([{
                "action": "SCMP_ACT_LOG", "names": [], "args": [{"op": "SCMP_CMP_EQ", "index": 0, "value": 0}],
            }])
        );
    }

    #[test]
    fn values_that_are_not_objects_are_unchanged() {
        for odd in [json!(null), json!([]), json!("x"), json!({"process": 5, "linux": "y"})] {
            assert_eq!(read(odd.clone()), odd);
        }
    }
}
