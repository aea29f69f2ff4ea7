//! `make bench`: the cost of a start, compared with runc and with the minimum that the same VM takes.
//!
//! Everything is measured in one run, in rounds, so that each figure is taken under the same conditions;
//! medians are reported. Prints a table and writes `target/bench/start.json`.

mod bare_vm;
mod checkpoint;
mod conversion;
mod cpu;
mod crowd;
mod disk;
mod end;
mod exec;
mod floor;
mod footprint;
mod fork;
mod network;
mod oci;
mod parallel;
mod pods;
mod ready;
mod report;
mod start;
mod traffic;
mod volumes;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
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
    /// Measure this part only; may be given more than once
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Compare volumes with virtio-9p, which this kernel (an uncompressed image) has and machinen's does not
    #[arg(long, value_name = "VMLINUX")]
    kernel_with_9p: Option<PathBuf>,
}

/// The parts that can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Starts, execs, forks and conversion, with their memory and processor time
    Starts,
    /// Work on files in a container
    Disk,
    /// Checkpoint and restore
    Checkpoints,
    /// Starts with a network and volumes
    Network,
    /// The speed of the network
    Traffic,
    /// Work on files in a volume
    Volumes,
    /// The OCI command line
    Oci,
    /// Pods by containerd's CRI plugin
    Pods,
    /// From a kill to the exit's event
    Ends,
}

/// Rounds of the slow measurements.
const FEW: usize = 5;
const FEWER: usize = 3;

/// The kinds of starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Clone,
    Boot,
    Runc,
    /// runsc in the place of runc, with its default platform (systrap), without a network.
    Gvisor,
}

impl Kind {
    fn runtime(self) -> String {
        match self {
            Self::Clone | Self::Boot => paths::runtime(),
            Self::Runc | Self::Gvisor => paths::RUNC.to_owned(),
        }
    }

    /// The program that containerd's shim for runc runs, if it is not runc.
    fn runc_binary(self, containerd: &Containerd) -> Result<Option<PathBuf>> {
        if self != Self::Gvisor {
            return Ok(None);
        }
        let (script, runsc) =
            (containerd.root().join("runsc"), paths::tools().join("../gvisor/usr/bin/runsc"));
        let text = format!("#!/bin/sh\nexec {} --ignore-cgroups --network=none \"$@\"\n", runsc.display());
        fs::write(&script, text)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(Some(script))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Clone => "clones",
            Self::Boot => "boots",
            Self::Runc => "runc",
            Self::Gvisor => "gVisor",
        }
    }
}

/// Machinen's configuration for one kind of starts: a user's, except for the directories.
pub(crate) fn setup_of(containerd: &Containerd, kind: Kind, cache: &Path) -> Setup {
    let mode = if kind == Kind::Clone { "use" } else { "off" };
    Setup::of_user().all_annotations().templates(&containerd.root().join(Templates::DIR), mode).set(
        "rootdisk",
        "dir",
        Value::path(cache),
    )
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinen-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let containerd = Containerd::start_with(Version::V1_7, &Setup::new())?;
    let image = Image::busybox()?;
    containerd.import(&image)?;
    match measure(&containerd, image.name(), args) {
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

fn measure(containerd: &Containerd, image: &str, args: &Args) -> Result<Report> {
    let cache = containerd.root().join("cache");
    fs::create_dir(&cache)?;
    let bench = Bench { containerd, image, cache, rounds: args.rounds };
    bench.configure(Kind::Clone)?;
    let template = Templates::new(containerd)?.build()?;
    let mut report = Report::new(args.rounds);
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    if wanted(Part::Disk) {
        disk::measure(containerd, args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Checkpoints) {
        checkpoint::measure(containerd, &mut report)?;
    }
    if wanted(Part::Network) {
        network::measure(containerd, image, &bench.cache, args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Traffic) {
        let qemu = bench.booted_qemu()?;
        traffic::measure(containerd, &qemu, args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Volumes) {
        let (qemu, kernel) = (bench.booted_qemu()?, args.kernel_with_9p.as_deref());
        volumes::measure(containerd, &qemu, kernel, args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Oci) {
        oci::measure(containerd, &bench.cache, args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Pods) {
        pods::measure(args.rounds.min(FEW), &mut report)?;
    }
    if wanted(Part::Ends) {
        end::measure(containerd, image, |kind| bench.configure(kind), args.rounds, &mut report)?;
    }
    // Last: it leaves many containers.
    if wanted(Part::Starts) {
        bench.starts(&mut report, template.holder)?;
    }
    Ok(report)
}

/// What all measurements have in common.
struct Bench<'a> {
    containerd: &'a Containerd,
    image: &'a str,
    cache: PathBuf,
    rounds: usize,
}

impl Bench<'_> {
    fn configure(&self, kind: Kind) -> Result<()> {
        self.containerd.configure(&setup_of(self.containerd, kind, &self.cache))
    }

    /// The arguments of the QEMU of a container whose VM boots. Containers are clones afterwards.
    fn booted_qemu(&self) -> Result<Vec<String>> {
        self.configure(Kind::Boot)?;
        let qemu = footprint::measure(self.containerd, self.image)?.qemu;
        self.configure(Kind::Clone)?;
        Ok(qemu)
    }

    /// Each figure of the checkpoint measurements is compared with another of the same run.
    fn starts(&self, report: &mut Report, holder: u32) -> Result<()> {
        let Self { containerd, image, rounds, .. } = *self;
        self.configure(Kind::Boot)?;
        let footprint = footprint::measure(containerd, image)?;
        let floor = floor::Floor::of(&footprint.qemu)?;
        let starts = start::measure(containerd, image, &floor, rounds)?;
        starts.report(report);
        let ready = ready::measure(containerd, image, &self.cache, rounds)?;
        report.time("ctr run --rm true, ready clone (pool.size)", "start_ready_ms", &ready.clone);
        report.time("  runc, in turn with it", "start_ready_runc_ms", &ready.runc);
        self.configure(Kind::Boot)?;
        let many = parallel::measure(containerd, image, |kind| self.configure(kind), rounds.min(FEWER))?;
        many.iter().for_each(|parallel| parallel.report(report));
        conversion::measure(containerd, rounds.min(FEW), report)?;
        exec::measure(containerd, image, rounds, report)?;
        self.configure(Kind::Clone)?;
        let forks = fork::measure(containerd, image, rounds.min(FEW))?;
        report.time("fork to running", "fork_ms", &forks.whole);
        report.time("  of which the checkpoint", "fork_dump_ms", &forks.dump);
        footprint.report(report);
        report.size("memory of the template", "template_kib", crowd::template_kib(holder)?);
        self.configure(Kind::Clone)?;
        crowd::measure(containerd, image, report)?;

        let (boot, clone) = (starts.boot.median(), starts.clone.median());
        let (floor, runc, gvisor) = (starts.floor.median(), starts.runc.median(), starts.gvisor.median());
        report.target("warm start: at most 1.25 x floor + 250 ms", clone, 1.25 * floor + 250.0, "ms");
        report.target("warm start without a template: the same", boot, 1.25 * floor + 250.0, "ms");
        report.target("clone to agent: at most 150 ms", starts.agent.median(), 150.0, "ms");
        report.target("clone: at most 0.35 x boot", clone / boot, 0.35, "x");
        report.target("clone: at most 2.3 x runc", clone / runc, 2.3, "x");
        report.target("clone: at most gVisor", clone / gvisor, 1.0, "x");
        report.target("ready clone: at most 0.35 x boot", ready.clone.median() / boot, 0.35, "x");
        let of_runc = ready.clone.median() / ready.runc.median();
        report.target("ready clone: at most 1.4 x runc", of_runc, 1.4, "x");
        let alone = parallel::cpu(&many, Kind::Clone, 1);
        let crowded = parallel::cpu(&many, Kind::Clone, 20);
        report.target("20 clones at once: at most 1.1 x the CPU of one each", crowded / alone, 1.1, "x");
        let limit = 2.0 * clone + forks.dump.median();
        report.target("fork: at most 2 x warm start + its checkpoint", forks.whole.median(), limit, "ms");
        Ok(())
    }
}
