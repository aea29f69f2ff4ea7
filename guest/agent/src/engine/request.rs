//! The requests to the zygote, as they cross its socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::mapping::MapRequest;
use crate::stdio::WindowSize;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ZygoteRequest {
    /// Comes with the report pipe and the process's ends of its streams.
    Create(CreateRequest),
    /// Comes with the report pipe, the OCI process in a file, a pidfd of the container's init, and the ends.
    Exec(ExecRequest),
    /// Comes with the report pipe, a container's root directory, and the socket for the requests.
    View,
    /// Comes with the report pipe.
    MapOwners(MapRequest),
    /// Comes with the report pipe, and the network namespace in which later processes begin.
    EnterNetwork,
}

/// One container to create.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CreateRequest {
    pub(super) id: String,
    /// Holds config.json.
    pub(super) bundle: PathBuf,
    /// libcontainer's state is in a directory of this one, named like the container.
    pub(super) state: PathBuf,
    pub(super) rootfs: PathBuf,
    /// The working directory of the process, in the container.
    pub(super) cwd: PathBuf,
    /// The spec does not set the process's OOM score.
    pub(super) keeps_oom_score: bool,
    /// The terminal's settings, if the process gets one.
    pub(super) console: Option<Console>,
}

/// One process to run in a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ExecRequest {
    /// Pid of the container's init, in the agent's pid namespace.
    pub(super) init: i32,
    /// CLONE_NEW* of the namespaces that the init does not share with the agent.
    pub(super) namespaces: i32,
    pub(super) cgroup: PathBuf,
    /// Holds the spec's linux.seccomp.
    pub(super) seccomp: Option<PathBuf>,
    /// The spec's linux.personality.domain.
    pub(super) personality: Option<String>,
    /// The terminal's settings, if the process gets one.
    pub(super) console: Option<Console>,
    /// The program, if it is not to be looked up by the first argument.
    pub(super) path: Option<PathBuf>,
}

/// The settings of a process's terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Console {
    /// The terminal's owner, as seen by the process that makes the terminal.
    pub(super) owner: u32,
    pub(super) size: Option<WindowSize>,
}
