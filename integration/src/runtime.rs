//! The OCI runtimes that tests drive by their command line.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{paths, setup::Setup};

/// The host's runc, which Debian has at this path.
const RUNC: &str = "/usr/sbin/runc";

/// A runtime with runc's command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Runc,
    Machinen,
}

impl Runtime {
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Machinen => "machinen",
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
            Self::Machinen => {
                let (script, config) = (dir.join("machinen"), dir.join("machinen.toml"));
                let program = paths::release_dir()?.join("machinen");
                let failed = || format!("cannot write {}", script.display());
                fs::write(&config, setup.machinen_toml()).with_context(failed)?;
                let text = format!(
                    "#!/bin/sh\nMACHINEN_CONFIG={} exec {} \"$@\"\n",
                    config.display(),
                    program.display()
                );
                fs::write(&script, text).with_context(failed)?;
                fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).with_context(failed)?;
                Ok(script)
            }
        }
    }
}
