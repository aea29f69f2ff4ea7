//! What the engine has to know of a container in order to run more processes in it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;
use pathrs::Root;
use serde_json::Value;

use super::{
    namespaces::{self, NamespaceError},
    oci::{SpecError, mapped},
    passwd, process,
    request::{Console, ExecRequest},
};
use crate::cgroup::Cgroup;

#[derive(Debug, Clone)]
pub(crate) struct ContainerContext {
    rootfs: PathBuf,
    cgroup: PathBuf,
    seccomp: Option<PathBuf>,
    personality: Option<String>,
    uid_mappings: Value,
}

/// A process, prepared for the engine.
#[derive(Debug)]
pub(crate) struct PreparedProcess {
    /// The OCI process, as JSON.
    pub(super) json: Vec<u8>,
    /// The program, if it is not to be looked up by the first argument.
    path: Option<PathBuf>,
    console: Console,
    owner: u32,
}

impl ContainerContext {
    /// Takes what is needed from the spec's linux section. Writes what is too large for a request into `dir`.
    pub(super) fn new(linux: &Value, rootfs: &Path, cgroup: &Path, dir: &Path) -> Result<Self, SpecError> {
        let seccomp = match &linux["seccomp"] {
            Value::Null => None,
            filter => {
                let path = dir.join("seccomp.json");
                fs::write(&path, filter.to_string())
                    .map_err(|source| SpecError::Write { path: path.clone(), source })?;
                Some(path)
            }
        };
        let personality = linux.pointer("/personality/domain").and_then(Value::as_str).map(str::to_owned);
        Ok(Self {
            rootfs: rootfs.to_owned(),
            cgroup: Cgroup::new(cgroup).path().to_owned(),
            seccomp,
            personality,
            uid_mappings: linux["uidMappings"].clone(),
        })
    }

    /// Reads the host's OCI process and adapts it.
    ///
    /// # Errors
    /// The process lacks something that every process needs.
    pub(crate) fn process(&self, json: &[u8], terminal: bool) -> Result<PreparedProcess, SpecError> {
        let mut value: Value = serde_json::from_slice(json).map_err(SpecError::ParseProcess)?;
        if !value.is_object() {
            return Err(SpecError::Missing { what: "process" });
        }
        process::adapt(&mut value, terminal)?;
        let uid = process::uid(&value);
        let root = Root::open(&self.rootfs).map_err(SpecError::Rootfs)?;
        process::add_home(&mut value, || passwd::home_of(&root, uid));
        let console = Console { owner: uid, size: process::console_size(&value) };
        let owner = mapped(&self.uid_mappings, uid);
        Ok(PreparedProcess { json: value.to_string().into_bytes(), path: None, console, owner })
    }

    /// The request to the zygote, with the namespaces that the init has at this moment.
    ///
    /// # Errors
    /// The init has ended, or cannot be examined.
    pub(super) fn request(
        &self,
        init: Pid,
        process: &PreparedProcess,
    ) -> Result<ExecRequest, NamespaceError> {
        Ok(ExecRequest {
            init: init.as_raw(),
            namespaces: namespaces::not_shared(init)?,
            cgroup: self.cgroup.clone(),
            seccomp: self.seccomp.clone(),
            personality: self.personality.clone(),
            console: Some(process.console),
            path: process.path.clone(),
        })
    }
}

impl PreparedProcess {
    /// A process without a terminal that executes the program at `path`. `process` is an OCI process that was adapted.
    pub(super) fn of_program(path: &Path, process: &Value) -> Self {
        Self {
            json: process.to_string().into_bytes(),
            path: Some(path.to_owned()),
            console: Console::default(),
            owner: 0,
        }
    }

    /// The owner of the process's streams, as seen by the agent.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }
}
