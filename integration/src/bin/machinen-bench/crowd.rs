//! Idle containers whose VMs are clones: memory of each when there are 1, 10 and 30, and what each start cost
//! the host in addition to its VM.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use machinen_integration::{
    containerd::Containerd,
    inventory::{self, Process},
};

use crate::{cpu, footprint::field, report::Report};

const SIZES: [usize; 3] = [1, 10, 30];

/// Processes that exist regardless of the number of containers.
const COMMON: [&str; 2] = ["template-holder", "template-builder"];

#[derive(Debug, Default)]
struct Crowd {
    /// KiB of one container, by the number of containers.
    pss: Vec<(usize, u64)>,
    private_dirty: Vec<(usize, u64)>,
    /// KiB of the shims alone.
    shim_pss: Vec<(usize, u64)>,
    /// Processor time of a start on the host outside QEMU: shim, its start and helpers, anchor.
    host_cpu: Duration,
    /// The same of containerd and `ctr`, on which a runtime has no influence.
    daemon_cpu: Duration,
    /// Processor time of QEMU until its container idles.
    qemu_cpu: Duration,
}

/// The containers stay until their containerd ends.
pub(crate) fn measure(containerd: &Containerd, image: &str, report: &mut Report) -> Result<()> {
    let mut crowd = Crowd::default();
    let before = containerd.inventory()?;
    let started = cpu::ended_children(containerd.pid())?;
    let daemon = cpu::own(containerd.pid())?;
    let mut count = 0;
    for size in SIZES {
        while count < size {
            containerd.run(image, &["sleep", "100000"]).detached().flag("--null-io").ok()?;
            count += 1;
        }
        let processes = containerd.inventory()?.since(&before).processes;
        let own = |process: &&Process| !COMMON.iter().any(|word| process.command.contains(word));
        let processes: Vec<_> = processes.iter().filter(own).collect();
        let each = |name: &str, word: &str| -> Result<u64> {
            let counted = processes.iter().filter(|process| process.command.contains(word));
            let sum = counted.map(|process| field(process, "smaps_rollup", name)).sum::<Result<u64>>()?;
            Ok(sum / size as u64)
        };
        crowd.pss.push((size, each("Pss:", "")?));
        crowd.private_dirty.push((size, each("Private_Dirty:", "")?));
        crowd.shim_pss.push((size, each("Pss:", "containerd-shim-machinen-v1")?));
        eprintln!("{size} idle containers");
        if size == SIZES[SIZES.len() - 1] {
            let number = u32::try_from(size)?;
            for process in &processes {
                let qemu = process.command.contains("microvm");
                let used = cpu::own(process.pid)?;
                *if qemu { &mut crowd.qemu_cpu } else { &mut crowd.host_cpu } += used;
                if !qemu {
                    crowd.host_cpu += cpu::ended_children(process.pid)?;
                }
            }
            // The starts of shims are children of containerd.
            crowd.host_cpu += cpu::ended_children(containerd.pid())?.saturating_sub(started);
            crowd.daemon_cpu = cpu::own(containerd.pid())?.saturating_sub(daemon);
            for time in [&mut crowd.host_cpu, &mut crowd.daemon_cpu, &mut crowd.qemu_cpu] {
                *time /= number;
            }
        }
    }
    crowd.report(report);
    Ok(())
}

impl Crowd {
    fn report(&self, report: &mut Report) {
        for (size, pss) in &self.pss {
            let key = format!("pss_clone_{size}_kib");
            report.size(format!("PSS of an idle clone, one of {size}"), key, *pss);
        }
        for (size, dirty) in &self.private_dirty {
            let key = format!("private_dirty_clone_{size}_kib");
            report.size(format!("private dirty memory of an idle clone, one of {size}"), key, *dirty);
        }
        for (size, pss) in &self.shim_pss {
            report.size(
                format!("PSS of the shim, one of {size}"),
                format!("pss_clone_shim_{size}_kib"),
                *pss,
            );
        }
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let host = millis(self.host_cpu);
        report.mean("processor time of a clone's start on the host, outside QEMU", "host_cpu_ms", host);
        report.mean("  the same of containerd, without ctr", "containerd_cpu_ms", millis(self.daemon_cpu));
        report.mean("  the same of QEMU, until the container idles", "qemu_cpu_ms", millis(self.qemu_cpu));
        let crowded = self.pss.last().map_or(0, |(_, pss)| *pss) as f64 / 1024.0;
        report.target("PSS of an idle clone, one of 30: at most 40 MiB", crowded, 40.0, "MiB");
        // With its translations, of which most are the template's and shared.
        let private = self.private_dirty.last().map_or(0, |(_, dirty)| *dirty) as f64 / 1024.0;
        report.target("private memory of an idle clone, one of 30: at most 30 MiB", private, 30.0, "MiB");
        report.target("processor time outside QEMU: at most 60 ms a start", host, 60.0, "ms");
    }
}

/// Memory of a template, KiB, whatever the number of its clones: the memory that its holder keeps.
pub(crate) fn template_kib(holder: u32) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let path = format!("/proc/{holder}/fd/3");
    let memory = fs::metadata(&path).with_context(|| format!("cannot look at {path}"))?;
    // Its QEMU, where clones are twins of it, is the holder's child.
    let all = inventory::descendants(holder)?;
    let qemu = all.iter().filter(|process| process.parent == holder && process.command.contains("microvm"));
    let stands = |process: &&Process| {
        fs::read_to_string(format!("/proc/{}/stat", process.pid)).is_ok_and(|stat| stat.contains(") T "))
    };
    let qemu =
        qemu.filter(stands).map(|process| field(process, "smaps_rollup", "Pss:")).sum::<Result<u64>>()?;
    Ok(memory.blocks() / 2 + qemu)
}
