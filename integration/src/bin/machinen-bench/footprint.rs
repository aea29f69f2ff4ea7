//! Memory of one idle container, and the size of what runs it.

use std::fs;

use anyhow::{Context, Result};
use machinen_integration::{
    containerd::Containerd,
    inventory::{Inventory, Process},
    paths,
};

use crate::report::Report;

#[derive(Debug)]
pub(crate) struct Footprint {
    /// QEMU's command line.
    pub(crate) qemu: Vec<String>,
    /// The shim, QEMU, and all else that the container needs on the host.
    pub(crate) pss_kib: u64,
    pub(crate) shim_pss_kib: u64,
    pub(crate) shim_rss_kib: u64,
    pub(crate) runc_pss_kib: u64,
    pub(crate) binary_kib: u64,
}

impl Footprint {
    pub(crate) fn report(&self, report: &mut Report) {
        let all = "PSS of shim, QEMU and anchor, one idle container, booted";
        report.size(all, "pss_machinen_kib", self.pss_kib);
        report.size("  of which the shim", "pss_shim_kib", self.shim_pss_kib);
        report.size("PSS of runc's shim, one idle container", "pss_runc_shim_kib", self.runc_pss_kib);
        report.size("RSS of the shim", "rss_shim_kib", self.shim_rss_kib);
        report.size("size of the shim's binary", "shim_binary_kib", self.binary_kib);
        let rss = self.shim_rss_kib as f64 * 1.024 / 1000.0;
        report.target("RSS of the shim: at most 8 MB", rss, 8.0, "MB");
    }
}

pub(crate) fn measure(containerd: &Containerd, image: &str) -> Result<Footprint> {
    let ours = idle(containerd, image, &paths::runtime(), |inventory| {
        let shim = find(inventory, "containerd-shim-machinen-v1")?;
        let qemu = find(inventory, "microvm")?;
        let command = fs::read_to_string(format!("/proc/{}/cmdline", qemu.pid))?;
        let pss = inventory.processes.iter().map(|process| field(process, "smaps_rollup", "Pss:"));
        Ok(Footprint {
            qemu: command.trim_end_matches('\0').split('\0').map(str::to_owned).collect(),
            pss_kib: pss.sum::<Result<u64>>()?,
            shim_pss_kib: field(shim, "smaps_rollup", "Pss:")?,
            shim_rss_kib: field(shim, "status", "VmRSS:")?,
            runc_pss_kib: 0,
            binary_kib: fs::metadata(paths::release_dir()?.join("containerd-shim-machinen-v1"))?.len() >> 10,
        })
    })?;
    let runc_pss_kib = idle(containerd, image, paths::RUNC, |inventory| {
        field(find(inventory, "containerd-shim-runc-v2")?, "smaps_rollup", "Pss:")
    })?;
    Ok(Footprint { runc_pss_kib, ..ours })
}

/// Looks at what a container that sleeps has on the host.
fn idle<T>(
    containerd: &Containerd,
    image: &str,
    runtime: &str,
    look: impl FnOnce(&Inventory) -> Result<T>,
) -> Result<T> {
    let before = containerd.inventory()?;
    let run = containerd.run(image, &["sleep", "1000"]).runtime(runtime).detached().flag("--null-io");
    let id = run.container().to_owned();
    run.ok()?;
    let seen = look(&containerd.inventory()?.since(&before))?;
    containerd.end(&id)?;
    containerd.settle(&before)?;
    Ok(seen)
}

fn find<'a>(inventory: &'a Inventory, word: &str) -> Result<&'a Process> {
    let found = inventory.processes.iter().find(|process| process.command.contains(word));
    found.with_context(|| format!("no {word} in\n{inventory}"))
}

/// A field of a file of the process's in /proc, KiB.
pub(crate) fn field(process: &Process, file: &str, name: &str) -> Result<u64> {
    let path = format!("/proc/{}/{file}", process.pid);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let value =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
    value.with_context(|| format!("no {name} in {path}"))
}
