//! Reduces a process that is added to a container to the part that applies inside the guest.

use machinen_base::error::{ErrorKind, HasKind};
use oci_spec::runtime::Process;

use super::{bundle::odd_variable, guest::drop_labels, json};

/// Why a process is refused.
#[derive(Debug, thiserror::Error)]
pub enum ProcessSpecError {
    /// The description is not JSON of the runtime-spec.
    #[error("the process is not a valid OCI process")]
    Parse(#[source] serde_json::Error),
    /// There is no command.
    #[error("the process has no arguments")]
    NoArgs,
    /// There is no working directory.
    #[error("the process has no working directory (cwd)")]
    NoCwd,
    /// The working directory is a relative path.
    #[error("the process has the relative cwd {cwd:?}; it must be absolute")]
    RelativeCwd {
        /// The path.
        cwd: String,
    },
    /// An environment variable is not of the form NAME=VALUE.
    #[error("the process has {variable:?} in its env; it must be NAME=VALUE")]
    Variable {
        /// The variable.
        variable: String,
    },
    /// A field is not supported.
    #[error("{what} of a process that is added to a container is not supported")]
    Unsupported {
        /// The field.
        what: &'static str,
    },
}

impl HasKind for ProcessSpecError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Parse(_)
            | Self::NoArgs
            | Self::NoCwd
            | Self::RelativeCwd { .. }
            | Self::Variable { .. } => ErrorKind::InvalidArgument,
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// Reads a process (runtime-spec, config.md, "Process") and reduces it to the guest's part.
///
/// # Errors
/// The text is not a valid process, or asks for something that machinen does not support.
pub fn reduce(json: &[u8], terminal: bool) -> Result<Process, ProcessSpecError> {
    let mut value = serde_json::from_slice(json).map_err(ProcessSpecError::Parse)?;
    json::process(&mut value);
    if value.is_object() && value.get("cwd").is_none() {
        return Err(ProcessSpecError::NoCwd);
    }
    let mut process: Process = serde_json::from_value(value).map_err(ProcessSpecError::Parse)?;
    if process.args().iter().flatten().next().is_none() {
        return Err(ProcessSpecError::NoArgs);
    }
    if !process.cwd().is_absolute() {
        return Err(ProcessSpecError::RelativeCwd { cwd: process.cwd().display().to_string() });
    }
    if let Some(variable) = odd_variable(&process) {
        return Err(ProcessSpecError::Variable { variable: variable.to_owned() });
    }
    for (what, given) in [
        ("ioPriority", process.io_priority().is_some()),
        ("scheduler", process.scheduler().is_some()),
        ("execCPUAffinity", process.exec_cpu_affinity().is_some()),
    ] {
        if given {
            return Err(ProcessSpecError::Unsupported { what });
        }
    }
    process.set_terminal(Some(terminal));
    drop_labels(&mut process);
    Ok(process)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reduced(change: impl FnOnce(&mut serde_json::Value)) -> Result<Process, ProcessSpecError> {
        let mut json = json!({
            "user": {"uid": 1, "gid": 2},
            "args": ["sh"],
            "cwd": "/tmp",
            "apparmorProfile": "docker-default",
            "selinuxLabel": "a:b:c",
        });
        change(&mut json);
        reduce(json.to_string().as_bytes(), true)
    }

    #[test]
    fn the_hosts_part_goes_and_the_rest_stays() {
        let process = reduced(|_| ()).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (1, 2));
        assert_eq!((process.apparmor_profile(), process.selinux_label()), (&None, &None));
        assert_eq!(process.terminal(), Some(true));
    }

    #[test]
    fn all_but_the_command_and_its_directory_may_be_absent_null_or_empty() {
        let least = json!({"args": ["sh"], "cwd": "/"});
        let least = reduce(least.to_string().as_bytes(), false).unwrap();
        for value in [json!(null), json!(""), json!({}), json!([])] {
            for member in [
                "user",
                "env",
                "capabilities",
                "rlimits",
                "consoleSize",
                "terminal",
                "apparmorProfile",
                "oomScoreAdj",
            ] {
                let mut process = json!({"args": ["sh"], "cwd": "/"});
                process[member] = value.clone();
                match reduce(process.to_string().as_bytes(), false) {
                    Ok(same) => {
                        assert_eq!((same.user(), same.args()), (least.user(), least.args()), "{process}");
                    }
                    // This member takes an object where a list is given, or the reverse.
                    Err(error) => assert!(value.is_object() || value.is_array(), "{process}: {error}"),
                }
            }
        }
    }

    #[test]
    fn refused_members_are_named() {
        let error = reduced(|json| json["scheduler"] = json!({"policy": "SCHED_IDLE"})).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().split(' ').next()),
            (ErrorKind::Unimplemented, Some("scheduler"))
        );
        let error = reduced(|json| json["args"] = json!([])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        for (member, value, words) in [
            ("cwd", json!(""), "no working directory"),
            ("cwd", json!("tmp"), "relative cwd"),
            ("env", json!(["A"]), "NAME=VALUE"),
        ] {
            let error = reduced(|json| json[member] = value).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(words), "{error}");
        }
        assert!(matches!(reduce(b"{", false), Err(ProcessSpecError::Parse(_))));
    }
}
