//! `make bench`: what a start costs, against runc and against the least that the same VM can take.
//!
//! Everything is measured in one run, in rounds, so that each figure saw the same machine; medians are reported.
//! Prints a table and writes `target/bench/start.json`.

mod checkpoint;
mod conversion;
mod cpu;
mod crowd;
mod disk;
mod exec;
mod floor;
mod footprint;
mod fork;
mod parallel;
mod ready;
mod report;
mod start;

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use machinen_integration::{
    containerd::Containerd,
    image::Image,
    paths::{self, Version},
    setup::{Setup, Value},
    templates::Templates,
};

use report::Report;

/// Measures starts, memory, conversion and execs of machinen against runc, on a private containerd.
#[derive(Debug, Parser)]
struct Args {
    /// How often each kind of start is measured; what takes long is measured less often.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

/// Rounds of what takes long.
const FEW: usize = 5;
const FEWER: usize = 3;

/// By the kinds of [`disk::measure`].
const DISK_TARGETS: [&str; 3] = [
    "untar: at least 0.9 x as fast as on the bare disk",
    "synced writes: at least 0.9 x as fast as on the bare disk",
    "sequential writing: at least 0.9 x as fast as on the bare disk",
];

/// What a start is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Clone,
    Boot,
    Runc,
}

impl Kind {
    fn runtime(self) -> String {
        if self == Self::Runc { paths::RUNC.to_owned() } else { paths::runtime() }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Clone => "clones",
            Self::Boot => "boots",
            Self::Runc => "runc",
        }
    }
}

/// Machinen's configuration for one kind of starts, as a user has it but for where things are.
pub(crate) fn setup_of(containerd: &Containerd, kind: Kind, cache: &Path) -> Setup {
    let mode = if kind == Kind::Clone { "use" } else { "off" };
    Setup::of_user().templates(&containerd.root().join(Templates::DIR), mode).set(
        "rootdisk",
        "dir",
        Value::path(cache),
    )
}

fn main() -> ExitCode {
    match run(Args::parse().rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinen-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(rounds: usize) -> Result<()> {
    let containerd = Containerd::start_with(Version::V1_7, &Setup::new())?;
    let image = Image::busybox()?;
    containerd.import(&image)?;
    match measure(&containerd, image.name(), rounds) {
        Ok(report) => {
            println!("{report}");
            let file = paths::workspace().join("target/bench/start.json");
            fs::create_dir_all(file.parent().context("no directory")?)?;
            fs::write(&file, format!("{:#}\n", report.json()))?;
            println!("written to {}", file.display());
            Ok(())
        }
        Err(error) => {
            eprintln!("{}", containerd.log());
            Err(error)
        }
    }
}

fn measure(containerd: &Containerd, image: &str, rounds: usize) -> Result<Report> {
    let cache = containerd.root().join("cache");
    fs::create_dir(&cache)?;
    let configure = |kind| containerd.configure(&setup_of(containerd, kind, &cache));
    let templates = Templates::new(containerd)?;
    configure(Kind::Clone)?;
    let template = templates.build()?;

    let mut report = Report::new(rounds);
    configure(Kind::Boot)?;
    let footprint = footprint::measure(containerd, image)?;
    let floor = floor::Floor::of(&footprint.qemu)?;
    let starts = start::measure(containerd, image, &floor, rounds)?;
    report_starts(&mut report, &starts);
    let ready = ready::measure(containerd, image, &cache, rounds)?;
    report.time("ctr run --rm true, ready clone (pool.size)", "start_ready_ms", &ready);
    configure(Kind::Boot)?;
    for many in parallel::measure(containerd, image, configure, rounds.min(FEWER))? {
        let (kind, width) = (many.kind.name(), many.width);
        let key = format!("parallel_{kind}_{width}");
        report.time(format!("{width} at once, {kind}"), format!("{key}_ms"), &many.wall);
        report.time("  processor time of each", format!("{key}_cpu_ms"), &many.cpu);
    }
    let conversion = conversion::measure(containerd, rounds.min(FEW))?;
    report.time("rootdisk of 200 MB in 10,000 files", "conversion_ms", &conversion.machinen);
    report.time("bare mke2fs -d of the same tree", "mke2fs_ms", &conversion.mke2fs);
    let execs = exec::measure(containerd, image, rounds)?;
    report.time("ctr tasks exec true, machinen", "exec_ms", &execs.machinen);
    report.time("ctr tasks exec true, runc", "exec_runc_ms", &execs.runc);
    let throughput = exec::throughput(containerd, 3)?;
    report.rate("stdout through a fifo", "stdout_mb_s", throughput);
    configure(Kind::Clone)?;
    let disk = disk::measure(containerd, rounds.min(FEW))?;
    for work in &disk {
        report.time(format!("{}, in a container", work.title), format!("{}_ms", work.key), &work.container);
        report.time(
            "  the same on its disk without the overlay",
            format!("{}_bare_ms", work.key),
            &work.bare,
        );
    }
    let checkpoints = checkpoint::measure(containerd)?;
    for cost in &checkpoints {
        let (mib, millis) = (cost.mib, |time: std::time::Duration| time.as_secs_f64() * 1000.0);
        let key = |what: &str| format!("{what}_{mib}_mib");
        report.mean(format!("checkpoint of {mib} MiB"), key("checkpoint_ms"), millis(cost.checkpoint));
        report.mean("  of which CRIU itself", key("checkpoint_criu_ms"), millis(cost.criu));
        report.mean(
            "  of which the container stands still",
            key("checkpoint_frozen_ms"),
            millis(cost.frozen),
        );
        let after_copy = millis(cost.frozen_after_copy);
        report.mean("  the same after a pre-dump", key("checkpoint_frozen_pre_dump_ms"), after_copy);
        report.mean("  restore of it, Create and Start", key("restore_ms"), millis(cost.restore));
        report.mean("  the same, memory fetched later", key("restore_lazy_ms"), millis(cost.lazy));
        report.size("  size of the files", key("checkpoint_kib"), cost.bundle_kib);
    }
    let forks = fork::measure(containerd, image, rounds.min(FEW))?;
    report.time("fork to running", "fork_ms", &forks.whole);
    report.time("  of which the checkpoint", "fork_dump_ms", &forks.dump);
    report.size(
        "PSS of shim, QEMU and anchor, one idle container, booted",
        "pss_machinen_kib",
        footprint.pss_kib,
    );
    report.size("  of which the shim", "pss_shim_kib", footprint.shim_pss_kib);
    report.size("PSS of runc's shim, one idle container", "pss_runc_shim_kib", footprint.runc_pss_kib);
    report.size("RSS of the shim", "rss_shim_kib", footprint.shim_rss_kib);
    report.size("size of the shim's binary", "shim_binary_kib", footprint.binary_kib);

    report.size("memory of the template", "template_kib", crowd::template_kib(template.holder)?);
    configure(Kind::Clone)?;
    let crowd = crowd::measure(containerd, image)?;
    for (size, pss) in &crowd.pss {
        report.size(format!("PSS of an idle clone, one of {size}"), format!("pss_clone_{size}_kib"), *pss);
    }
    for (size, dirty) in &crowd.private_dirty {
        let key = format!("private_dirty_clone_{size}_kib");
        report.size(format!("private dirty memory of an idle clone, one of {size}"), key, *dirty);
    }
    for (size, pss) in &crowd.shim_pss {
        report.size(format!("PSS of the shim, one of {size}"), format!("pss_clone_shim_{size}_kib"), *pss);
    }
    let millis = |time: std::time::Duration| time.as_secs_f64() * 1000.0;
    let host = millis(crowd.host_cpu);
    report.mean("processor time of a clone's start on the host, outside QEMU", "host_cpu_ms", host);
    report.mean("  the same of containerd, without ctr", "containerd_cpu_ms", millis(crowd.daemon_cpu));
    report.mean("  the same of QEMU, until the container idles", "qemu_cpu_ms", millis(crowd.qemu_cpu));

    let (boot, clone) = (starts.boot.median(), starts.clone.median());
    let (floor, runc) = (starts.floor.median(), starts.runc.median());
    report.target("warm start: at most 1.25 x floor + 250 ms", clone, 1.25 * floor + 250.0, "ms");
    report.target("warm start without a template: the same", boot, 1.25 * floor + 250.0, "ms");
    report.target("clone to agent: at most 150 ms", starts.agent.median(), 150.0, "ms");
    report.target("clone: at most 0.35 x boot", clone / boot, 0.35, "x");
    report.target("clone: at most 2.5 x runc", clone / runc, 2.5, "x");
    report.target("ready clone: at most 0.35 x boot", ready.median() / boot, 0.35, "x");
    report.target("ready clone: at most 2.5 x runc", ready.median() / runc, 2.5, "x");
    let crowded = crowd.pss.last().map_or(0, |(_, pss)| *pss);
    report.target("PSS of an idle clone, one of 30: at most 40 MiB", crowded as f64 / 1024.0, 40.0, "MiB");
    report.target("processor time outside QEMU: at most 60 ms a start", host, 60.0, "ms");
    let ratio = conversion.machinen.median() / conversion.mke2fs.median();
    report.target("conversion: at most 1.2 x mke2fs", ratio, 1.2, "x");
    if let [small, .., middle, large] = checkpoints.as_slice() {
        let (whole, criu) = (millis(middle.checkpoint), millis(middle.criu));
        report.target("checkpoint of 256 MiB: at most 1.3 x CRIU + 200 ms", whole, 1.3 * criu + 200.0, "ms");
        let ratio = millis(large.lazy) / millis(small.lazy);
        report.target("lazy restore of 1 GiB: at most 1.5 x that of 8 MiB", ratio, 1.5, "x");
    }
    let limit = 2.0 * clone + forks.dump.median();
    report.target("fork: at most 2 x warm start + its checkpoint", forks.whole.median(), limit, "ms");
    let exec = execs.machinen.median() / execs.runc.median();
    report.target("exec: at most 3 x runc", exec, 3.0, "x");
    for (work, title) in disk.iter().zip(DISK_TARGETS) {
        report.target_at_least(title, work.bare.median() / work.container.median(), 0.9, "x");
    }
    report.target_at_least("stdout: at least 50 MB/s", throughput, 50.0, "MB/s");
    report.target("RSS of the shim: at most 8 MB", footprint.shim_rss_kib as f64 * 1.024 / 1000.0, 8.0, "MB");
    Ok(report)
}

fn report_starts(report: &mut Report, starts: &start::Starts) {
    report.time("ctr run --rm true, boot with a cold cache", "start_cold_ms", &starts.cold);
    report.time("ctr run --rm true, boot", "start_warm_ms", &starts.boot);
    report.time("ctr run --rm true, clone", "start_clone_ms", &starts.clone);
    report.time("ctr run --rm true, runc", "start_runc_ms", &starts.runc);
    report.time("floor: the same VM boots and powers off", "floor_ms", &starts.floor);
    report.time("clone to the agent's answer", "clone_to_agent_ms", &starts.agent);
    report.time("to the first byte of output, clone", "first_byte_clone_ms", &starts.first_byte);
    report.time("to the first byte of output, runc", "first_byte_runc_ms", &starts.first_byte_runc);
    for phase in &starts.phases {
        let [cold, boot, clone] = [&phase.cold, &phase.boot, &phase.clone].map(|samples| samples.median());
        report.phase(&phase.name, cold, boot, clone);
    }
}
