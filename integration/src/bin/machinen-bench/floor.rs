//! The floor: the QEMU, kernel and guest image of a container, booting to an agent that powers off at once.
//!
//! The command line is read from a running container's QEMU, so it is always the one that machinen uses. Only
//! the inherited sockets become null devices, the tap devices a network of their own, and the inherited files become
//! files opened by a shell.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use machinen_integration::{paths, process::Invocation};

/// Makes the agent power the VM off as soon as it runs.
const POWER_OFF: &str = "machinen.poweroff";

#[derive(Debug)]
pub(crate) struct Floor {
    invocation: Invocation,
}

impl Floor {
    /// From the arguments of a container's QEMU, its program first.
    pub(crate) fn of(qemu: &[String]) -> Result<Self> {
        let assets = paths::assets();
        let mut script = String::from("exec");
        let mut next_is_kernel = false;
        let mut next_is_append = false;
        for arg in qemu {
            let mut arg = arg.clone();
            if next_is_kernel {
                arg = assets.join("vmlinux").display().to_string();
            } else if next_is_append {
                arg = format!("{arg} {POWER_OFF}");
            } else if let Some(tail) = arg.strip_prefix("socket,id=") {
                let id = tail.split(',').next().unwrap_or_default();
                arg = format!("null,id={id}");
            } else if let Some(tail) = arg.strip_prefix("tap,id=") {
                // A network of its own, which leads nowhere.
                let id = tail.split(',').next().unwrap_or_default();
                arg = format!("user,id={id},restrict=on");
            }
            next_is_kernel = arg == "-kernel";
            next_is_append = arg == "-append";
            script += &format!(" '{}'", arg.replace('\'', r"'\''"));
        }
        let fd = qemu.iter().find_map(|arg| arg.strip_prefix("fd=")?.split(',').next());
        let fd = fd.context("QEMU's arguments have no inherited image")?;
        script += &format!(" {fd}<'{}'", assets.join("guest.img").display());
        Ok(Self { invocation: Invocation::new("/bin/sh").arg("-c").arg(script) })
    }

    /// The whole process, from its start to its end.
    pub(crate) fn run(&self) -> Result<Duration> {
        let output = self.invocation.run()?;
        ensure!(output.status == 0 && output.stderr.is_empty(), "the bare VM: {output}");
        Ok(output.duration)
    }
}
