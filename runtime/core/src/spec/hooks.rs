//! The hooks of a configuration: which of them the host runs, and which are refused.

use std::path::PathBuf;

use machinen_base::error::{ErrorKind, HasKind};
use oci_spec::runtime::{Hook, Hooks, Spec};

/// Why a hook is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HookSpecError {
    /// The path of the program depends on a working directory.
    #[error("hooks.{stage}[{number}].path is {path:?}; it must be absolute")]
    Path {
        /// The name of the list.
        stage: &'static str,
        /// The place in the list, from 0.
        number: usize,
        /// The path.
        path: PathBuf,
    },
    /// The program would have no time.
    #[error("hooks.{stage}[{number}].timeout is {timeout}; it must be greater than zero")]
    Timeout {
        /// The name of the list.
        stage: &'static str,
        /// The place in the list, from 0.
        number: usize,
        /// The timeout in seconds.
        timeout: i64,
    },
    /// The text is no environment variable.
    #[error("hooks.{stage}[{number}].env has {variable:?}; it must be NAME=VALUE")]
    Variable {
        /// The name of the list.
        stage: &'static str,
        /// The place in the list, from 0.
        number: usize,
        /// The text.
        variable: String,
    },
}

impl HasKind for HookSpecError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// Takes the hooks that run on the host out of the configuration. Those of `startContainer` stay, because the guest
/// runs them.
///
/// Source: runtime-spec, config.md ("POSIX-platform Hooks").
///
/// # Errors
/// A hook cannot be run.
pub(super) fn take(spec: &mut Spec) -> Result<Hooks, HookSpecError> {
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    for (stage, list) in [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        let numbered = list.iter().flatten().enumerate();
        numbered.into_iter().try_for_each(|(number, hook)| check(stage, number, hook))?;
    }
    let in_guest = hooks.start_container_mut().take().filter(|list| !list.is_empty());
    let mut kept = Hooks::default();
    kept.set_start_container(in_guest.clone());
    spec.set_hooks(in_guest.map(|_| kept));
    Ok(hooks)
}

fn check(stage: &'static str, number: usize, hook: &Hook) -> Result<(), HookSpecError> {
    if !hook.path().is_absolute() {
        return Err(HookSpecError::Path { stage, number, path: hook.path().clone() });
    }
    if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
        return Err(HookSpecError::Timeout { stage, number, timeout });
    }
    let is_odd = |variable: &&String| variable.split_once('=').is_none_or(|(name, _)| name.is_empty());
    match hook.env().iter().flatten().find(is_odd) {
        Some(variable) => Err(HookSpecError::Variable { stage, number, variable: variable.clone() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn split(hooks: Value) -> Result<(Hooks, Spec), HookSpecError> {
        let mut spec = Spec::default();
        spec.set_hooks(Some(serde_json::from_value(hooks).unwrap()));
        take(&mut spec).map(|hooks| (hooks, spec))
    }

    #[test]
    fn only_the_guests_hooks_stay() {
        let all = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
        let hooks: Value =
            all.iter().map(|stage| ((*stage).to_owned(), json!([{ "path": "/bin/true" }]))).collect();
        let (host, spec) = split(hooks).unwrap();
        assert_eq!(host.start_container(), &None);
        assert_eq!(host.poststop().as_ref().unwrap().len(), 1);
        let guest = serde_json::to_value(spec.hooks()).unwrap();
        assert_eq!(guest, json!({ "startContainer": [{ "path": "/bin/true" }] }));
    }

    #[test]
    fn without_hooks_of_the_guest_there_are_none() {
        for hooks in [json!({}), json!({ "startContainer": [] }), json!({ "poststop": [{ "path": "/a" }] })] {
            assert_eq!(split(hooks).unwrap().1.hooks(), &None);
        }
    }

    #[test]
    fn hooks_that_cannot_run_are_named() {
        for (hook, words) in [
            (json!({ "path": "bin/true" }), "hooks.poststart[1].path is \"bin/true\"; it must be absolute"),
            (json!({ "path": "/a", "timeout": 0 }), "hooks.poststart[1].timeout is 0"),
            (json!({ "path": "/a", "timeout": -5 }), "timeout is -5; it must be greater than zero"),
            (json!({ "path": "/a", "env": ["A=b", "odd"] }), "hooks.poststart[1].env has \"odd\""),
        ] {
            let error = split(json!({ "poststart": [{ "path": "/a" }, hook] })).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
