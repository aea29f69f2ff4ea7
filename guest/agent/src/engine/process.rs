//! Adapts the process of an OCI configuration to libcontainer and to the agent's own exec.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::oci::{SpecError, items, number};
use crate::stdio::WindowSize;

/// Changes what libcontainer would misread, or would do unlike runc.
pub(super) fn adapt(process: &mut Value, terminal: bool) -> Result<(), SpecError> {
    if items(&process["args"]).next().is_none() {
        return Err(SpecError::Missing { what: "process.args" });
    }
    let cwd = process["cwd"].as_str().unwrap_or_default();
    if !cwd.starts_with('/') {
        return Err(SpecError::Cwd { cwd: cwd.to_owned() });
    }
    // libcontainer takes "false" for "set late", when the process has lost the right to install a seccomp
    // filter.
    if process["noNewPrivileges"] == false {
        process["noNewPrivileges"] = Value::Null;
    }
    // A process without this section has no capabilities; libcontainer would give it all.
    if process["capabilities"].is_null() {
        process["capabilities"] = json!({});
    }
    unify_env(process);
    // The request's streams decide, not the configuration.
    process["terminal"] = terminal.into();
    Ok(())
}

/// Leaves the last one of the variables with the same name, as runc does. What programs would see of several is up to them.
pub(super) fn unify_env(process: &mut Value) {
    let name = |var: &Value| var.as_str().map(|var| var.split('=').next().unwrap_or(var).to_owned());
    let mut seen = HashSet::new();
    let mut kept: Vec<Value> = items(&process["env"]).cloned().collect();
    kept.reverse();
    kept.retain(|var| name(var).is_none_or(|name| seen.insert(name)));
    kept.reverse();
    if !process["env"].is_null() {
        process["env"] = kept.into();
    }
}

/// Sets a missing HOME. libcontainer would ask the C library, which loads libraries that the tenant's files
/// name.
pub(super) fn add_home(process: &mut Value, home: impl FnOnce() -> String) {
    let is_home = |var: &Value| var.as_str().is_some_and(|var| var.starts_with("HOME="));
    if items(&process["env"]).any(|var| is_home(var) && *var != "HOME=") {
        return;
    }
    let given: Vec<Value> = items(&process["env"]).filter(|var| !is_home(var)).cloned().collect();
    process["env"] = given.into_iter().chain([format!("HOME={}", home()).into()]).collect();
}

pub(super) fn uid(process: &Value) -> u32 {
    number(&process["user"]["uid"])
}

/// The size of the caller's terminal; None when it is missing or invalid.
pub(super) fn console_size(process: &Value) -> Option<WindowSize> {
    let side = |name: &str| process["consoleSize"][name].as_u64().and_then(|n| u16::try_from(n).ok());
    Some(WindowSize { width: side("width")?, height: side("height")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_variables_with_a_name_the_last_one_stays() {
        let mut process = json!({"env": ["A=1", "HOME=/x", "B", "A=2", "HOME=", "AB=3", "B=4"]});
        unify_env(&mut process);
        assert_eq!(process["env"], json!(["A=2", "HOME=", "AB=3", "B=4"]));
        add_home(&mut process, || "/root".to_owned());
        assert_eq!(process["env"], json!(["A=2", "AB=3", "B=4", "HOME=/root"]));
        let mut bare = json!({});
        unify_env(&mut bare);
        assert_eq!(bare["env"], Value::Null);
    }

    #[test]
    fn a_missing_or_empty_home_is_found() {
        let mut process = json!({"env": ["HOME=", "A=b"]});
        add_home(&mut process, || "/root".to_owned());
        assert_eq!(process["env"], json!(["A=b", "HOME=/root"]));
        add_home(&mut process, || unreachable!("it is there"));
        assert_eq!(process["env"], json!(["A=b", "HOME=/root"]));
    }

    #[test]
    fn a_size_is_taken_whole_or_not_at_all() {
        let size = |value| console_size(&json!({"consoleSize": value}));
        assert_eq!(size(json!({"height": 24, "width": 80})), Some(WindowSize { width: 80, height: 24 }));
        assert_eq!(size(json!({"height": 24})), None);
        assert_eq!(size(json!({"height": 1 << 20, "width": 80})), None);
        assert_eq!(size(Value::Null), None);
    }
}
