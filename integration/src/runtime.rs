//! The OCI runtimes that tests drive by their command line.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{paths, setup::Setup};

/// The host's runc, which Debian has at this path.
pub const RUNC: &str = "/usr/sbin/runc";
/// The host's crun, which Debian has at this path.
const CRUN: &str = "/usr/bin/crun";

/// A runtime with runc's command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    Machinen,
    /// The host's crun, for comparison in the bench.
    Crun,
    /// gVisor with its default platform (systrap), without a network and cgroups, for comparison in the bench.
    Runsc,
}

impl Runtime {
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Machinen => "machinen",
            Self::Crun => "crun",
            Self::Runsc => "runsc",
        }
    }

    /// Whether a runtime leaves a file of `/run`, as an inventory shows it, to its next containers.
    pub fn keeps(self, file: &str) -> bool {
        let kept: &[&str] = match self {
            // The second is what CRIU has found out about the kernel.
            Self::Runc => &["d /run/runc", "/run/criu.kdat"],
            Self::Machinen => &[
                "d /run/machinen/containers",
                "d /run/machinen/containers/@pods",
                "d /run/machinen/starting",
                "d /run/machinen/users",
            ],
            Self::Crun | Self::Runsc => &[],
        };
        kept.contains(&file)
    }

    /// Whether each container has a kernel of its own.
    pub fn has_vm(self) -> bool {
        self == Self::Machinen
    }

    /// The runtime's program. machinen gets a script in the given directory, which names its configuration: conmon passes
    /// no environment on.
    ///
    /// # Errors
    /// machinen has not been built, or the script cannot be written.
    pub fn program(self, dir: &Path, setup: &Setup) -> Result<PathBuf> {
        match self {
            Self::Runc => Ok(RUNC.into()),
            Self::Crun => Ok(CRUN.into()),
            Self::Runsc => {
                let program = paths::tools().join("../gvisor/usr/bin/runsc");
                let command = format!("{} --ignore-cgroups --network=none", program.display());
                script(dir.join("runsc"), "", &command)
            }
            Self::Machinen => {
                let (config, program) = (dir.join("machinen.toml"), paths::release_dir()?.join("machinen"));
                fs::write(&config, setup.machinen_toml())
                    .with_context(|| format!("cannot write {}", config.display()))?;
                let set = format!("export MACHINEN_CONFIG={}\n", config.display());
                script(dir.join("machinen"), &set, &program.display().to_string())
            }
        }
    }
}

/// Writes a program that becomes a command with its own arguments.
fn script(path: PathBuf, before: &str, command: &str) -> Result<PathBuf> {
    let write = || {
        fs::write(&path, format!("#!/bin/sh\n{before}exec {command} \"$@\"\n"))?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755))
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
