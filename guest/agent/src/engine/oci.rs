//! Reads values of an OCI configuration, which is plain JSON here, and reports what is wrong with it.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("the OCI configuration cannot be parsed")]
    Parse(#[source] serde_json::Error),
    #[error("the process cannot be parsed")]
    ParseProcess(#[source] serde_json::Error),
    #[error("the OCI configuration has no {what}")]
    Missing { what: &'static str },
    #[error("process.cwd {cwd:?} is not an absolute path")]
    Cwd { cwd: String },
    #[error("linux.cgroupsPath {path} is not an absolute path without '..'")]
    CgroupPath { path: PathBuf },
    #[error(
        "filesystem {kind:?} must be mounted on ordinary directory: {path:?} of the image is something else"
    )]
    NoDirectory { kind: String, path: PathBuf },
    #[error("seccomp listeners are not supported")]
    SeccompListener,
    #[error("linux.resources.devices[{number}] cannot be parsed")]
    DeviceRule { number: usize },
    #[error(
        "{path} is a character device of the host ({major}:{minor}) that the VM does not have: only disks of the host can be \
         given to a container"
    )]
    NoDevice { path: String, major: i64, minor: i64 },
    #[error("sysctl {key:?} is not a valid name")]
    SysctlName { key: String },
    #[error("cannot set sysctl {key}")]
    Sysctl { key: String, source: io::Error },
    #[error("the path {path:?} of a startContainer hook is not absolute, or too long")]
    HookPath { path: String },
    #[error("the mount {path} cannot have the option tmpcopyup: {reason}")]
    CopyUp { path: PathBuf, reason: &'static str },
    #[error("linux.{what} has {count} ranges of ids; 1 to {most} are possible")]
    IdRanges { what: &'static str, count: usize, most: usize },
    #[error("cannot use the root file system")]
    Rootfs(#[source] pathrs::error::Error),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
}

/// The elements of an array; none of anything else.
pub(super) fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// An id. The engine reports an invalid one when it parses the spec.
pub(super) fn number(value: &Value) -> u32 {
    value.as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or(0)
}

/// The text of a path, as the value of a setting.
pub(super) fn path_value(path: &Path) -> Value {
    path.to_string_lossy().into()
}

/// The uid outside the container's user namespace of a user inside it.
pub(super) fn mapped(uid_mappings: &Value, uid: u32) -> u32 {
    items(uid_mappings)
        .find_map(|map| {
            let offset = uid.checked_sub(number(&map["containerID"]))?;
            (offset < number(&map["size"])).then(|| number(&map["hostID"]).wrapping_add(offset))
        })
        .unwrap_or(uid)
}
