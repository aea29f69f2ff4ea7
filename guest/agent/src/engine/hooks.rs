//! The startContainer hooks of a configuration, as processes that the engine runs in the container.
//!
//! A hook has the user, the privileges and the limits of the container's own process, as runc's hooks have, which its
//! init runs after it has given up its privileges. A hook without an environment has that of the process.

use std::{path::PathBuf, time::Duration};

use machinen_protocol::HOOK_PATIENCE;
use serde_json::{Value, json};

use super::{
    join::PreparedProcess,
    oci::{SpecError, items},
};

/// Longest path of a program, bytes (PATH_MAX).
const MAX_PATH: usize = 4096;

/// One hook.
#[derive(Debug)]
pub(crate) struct PreparedHook {
    pub(crate) path: PathBuf,
    pub(crate) process: PreparedProcess,
    /// How long the hook may take.
    pub(crate) patience: Duration,
}

/// Prepares the hooks of `hooks`, the section of a configuration whose adapted process is `process`.
pub(super) fn prepare(hooks: &Value, process: &Value) -> Result<Vec<PreparedHook>, SpecError> {
    items(&hooks["startContainer"]).map(|hook| prepare_one(hook, process)).collect()
}

fn prepare_one(hook: &Value, process: &Value) -> Result<PreparedHook, SpecError> {
    let path = hook["path"].as_str().unwrap_or_default();
    if !path.starts_with('/') || path.len() >= MAX_PATH {
        return Err(SpecError::HookPath { path: path.to_owned() });
    }
    let mut process = process.clone();
    let has_args = items(&hook["args"]).next().is_some();
    process["args"] = if has_args { hook["args"].clone() } else { json!([path]) };
    if !hook["env"].is_null() {
        process["env"] = hook["env"].clone();
    }
    process["terminal"] = false.into();
    Ok(PreparedHook {
        path: path.into(),
        process: PreparedProcess::of_program(path.as_ref(), &process),
        patience: hook["timeout"].as_u64().map_or(HOOK_PATIENCE, Duration::from_secs),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_the_containers_process_with_its_own_program() {
        let process = json!({
            "user": {"uid": 5, "gid": 6}, "args": ["server"], "env": ["A=b", "HOME=/"], "cwd": "/srv", "terminal": true,
        });
        let hooks = json!({ "startContainer": [
            { "path": "/bin/a", "args": ["b", "c"], "env": ["D=e"], "timeout": 3 }, { "path": "/bin/f" },
        ] });
        let prepared = prepare(&hooks, &process).unwrap();
        let read = |hook: &PreparedHook| serde_json::from_slice::<Value>(&hook.process.json).unwrap();
        let user = json!({"uid": 5, "gid": 6});
        assert_eq!(
            read(&prepared[0]),
            json!({ "user": user, "args": ["b", "c"], "env": ["D=e"], "cwd": "/srv", "terminal": false })
        );
        assert_eq!(
            read(&prepared[1]),
            json!({ "user": user, "args": ["/bin/f"], "env": ["A=b", "HOME=/"], "cwd": "/srv", "terminal": false })
        );
        assert_eq!(
            prepared.iter().map(|hook| hook.patience).collect::<Vec<_>>(),
            [Duration::from_secs(3), HOOK_PATIENCE]
        );
        assert!(prepare(&Value::Null, &process).unwrap().is_empty());
        let relative = json!({ "startContainer": [{ "path": "bin/a" }] });
        assert!(matches!(prepare(&relative, &process), Err(SpecError::HookPath { .. })));
    }
}
