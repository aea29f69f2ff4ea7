//! Adapts a seccomp profile to libcontainer, which differs from runc.

use libseccomp::ScmpSyscall;
use serde_json::{Value, json};

use super::oci::items;

/// Larger than the number of any system call that libseccomp knows.
const END: i32 = 512;

/// The default actions for which runc leaves new system calls alone: they are allowed, or a tracer knows what to do.
const PERMISSIVE: [&str; 3] = ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"];

/// Changes what libcontainer would take for something else, and adds what runc adds.
pub(super) fn adapt(profile: &mut Value) {
    if profile.is_object() {
        exchange_masks(profile);
        answer_newer(profile);
    }
}

/// Exchanges the values of masked comparisons: they are true if the argument, masked by `value`, is `valueTwo`
/// (runtime-spec, config-linux.md, "Seccomp"), and libcontainer takes them the other way round. Then a rule that allows
/// clone(2) without new namespaces allows it with them.
fn exchange_masks(profile: &mut Value) {
    let rules = profile.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten();
    let args = rules.filter_map(|rule| rule.get_mut("args")?.as_array_mut()).flatten();
    for arg in args.filter(|arg| arg["op"] == "SCMP_CMP_MASKED_EQ") {
        let (mask, value) = (arg["value"].take(), arg["valueTwo"].take());
        arg["value"] = if value.is_null() { json!(0) } else { value };
        arg["valueTwo"] = if mask.is_null() { json!(0) } else { mask };
    }
}

/// Has system calls that are newer than all that the profile names fail with ENOSYS: its author did not know them, and libc
/// uses older ones instead, which it does not after EPERM. runc does the same in the filter's program, which also covers
/// those that libseccomp does not know.
fn answer_newer(profile: &mut Value) {
    let action = profile["defaultAction"].as_str().unwrap_or_default();
    if PERMISSIVE.contains(&action) || profile["defaultErrnoRet"] == libc::ENOSYS {
        return;
    }
    let names = items(&profile["syscalls"]).flat_map(|rule| items(&rule["names"])).filter_map(Value::as_str);
    let known = names.filter_map(|name| ScmpSyscall::from_name(name).ok());
    let Some(newest) = known.map(ScmpSyscall::as_raw_syscall).max().filter(|newest| *newest >= 0) else {
        return;
    };
    let newer = (newest + 1..END).filter_map(|number| ScmpSyscall::from_raw_syscall(number).get_name().ok());
    let names: Vec<_> = newer.collect();
    if let Some(rules) = profile["syscalls"].as_array_mut().filter(|_| !names.is_empty()) {
        rules.push(json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_where_the_engine_looks_for_it() {
        let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["clone"], "args": [
            {"index": 0, "value": 0x7e02_0000, "op": "SCMP_CMP_MASKED_EQ"},
            {"index": 1, "value": 12, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"},
            {"index": 2, "value": 5, "op": "SCMP_CMP_EQ"},
        ]}, {"names": ["read"]}]});
        adapt(&mut profile);
        let expected = json!([
            {"index": 0, "value": 0, "valueTwo": 0x7e02_0000, "op": "SCMP_CMP_MASKED_EQ"},
            {"index": 1, "value": 8, "valueTwo": 12, "op": "SCMP_CMP_MASKED_EQ"},
            {"index": 2, "value": 5, "op": "SCMP_CMP_EQ"},
        ]);
        assert_eq!(profile["syscalls"][0]["args"], expected);
        let mut none = Value::Null;
        adapt(&mut none);
        assert_eq!(none, Value::Null);
    }

    #[test]
    fn calls_newer_than_the_profile_do_not_exist() {
        let profile = |action: &str, errno: Value| {
            let rule = json!({"names": ["openat2", "read", "no_such_call"], "action": "SCMP_ACT_ALLOW"});
            let mut profile = json!({"defaultAction": action, "defaultErrnoRet": errno, "syscalls": [rule]});
            adapt(&mut profile);
            profile["syscalls"].as_array().unwrap().clone()
        };
        for (action, errno) in [("SCMP_ACT_ERRNO", Value::Null), ("SCMP_ACT_KILL", json!(1))] {
            let rules = profile(action, errno);
            let names: Vec<_> = items(&rules[1]["names"]).filter_map(Value::as_str).collect();
            // openat2 has the number 437.
            assert!(names.contains(&"faccessat2") && !names.contains(&"clone3"), "{names:?}");
            assert!(rules[1]["action"] == "SCMP_ACT_ERRNO" && rules[1]["errnoRet"] == libc::ENOSYS);
        }
        for (action, errno) in [("SCMP_ACT_ALLOW", Value::Null), ("SCMP_ACT_ERRNO", json!(libc::ENOSYS))] {
            assert_eq!(profile(action, errno).len(), 1, "{action}");
        }
    }
}
