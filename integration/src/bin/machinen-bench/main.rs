//! `make bench`: what a start costs, against runc and against the least that the same VM can take.
//!
//! Everything is measured in one run, in rounds, so that each figure saw the same machine; medians are reported.
//! Prints a table and writes `target/bench/start.json`. `MACHINEN_BENCH_ROUNDS` sets the number of rounds.

mod conversion;
mod floor;
mod footprint;
mod report;
mod start;

use std::{env, fs, process::ExitCode};

use anyhow::{Context, Result};
use machinen_integration::{
    containerd::Containerd,
    image::Image,
    paths::{self, Version},
    setup::Setup,
};

use report::Report;

const ROUNDS: usize = 9;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinen-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let rounds = match env::var("MACHINEN_BENCH_ROUNDS") {
        Ok(text) => text.parse().context("MACHINEN_BENCH_ROUNDS is no number")?,
        Err(_) => ROUNDS,
    };
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
    let mut report = Report::new(rounds);
    let footprint = footprint::measure(containerd, image)?;
    let floor = floor::Floor::of(&footprint.qemu)?;
    let starts = start::measure(containerd, image, &floor, rounds)?;
    let conversion = conversion::measure(containerd, rounds.min(5))?;

    let (warm, floor, runc) = (starts.warm.median(), starts.floor.median(), starts.runc.median());
    report.time("ctr run --rm true, machinen, cold cache", "start_cold_ms", starts.cold.median());
    report.time("ctr run --rm true, machinen, warm", "start_warm_ms", warm);
    report.time("ctr run --rm true, runc", "start_runc_ms", runc);
    report.time("floor: the same VM boots and powers off", "floor_ms", floor);
    for phase in &starts.phases {
        report.phase(&phase.name, phase.cold.median(), phase.warm.median());
    }
    report.time("rootdisk of 200 MB in 10,000 files", "conversion_ms", conversion.machinen.median());
    report.time("bare mke2fs -d of the same tree", "mke2fs_ms", conversion.mke2fs.median());
    report.size("PSS of shim, QEMU and anchor, one idle container", "pss_machinen_kib", footprint.pss_kib);
    report.size("  of which the shim", "pss_shim_kib", footprint.shim_pss_kib);
    report.size("PSS of runc's shim, one idle container", "pss_runc_shim_kib", footprint.runc_pss_kib);
    report.size("RSS of the shim", "rss_shim_kib", footprint.shim_rss_kib);
    report.size("size of the shim's binary", "shim_binary_kib", footprint.binary_kib);

    report.target("warm start: at most 1.25 x floor + 250 ms", warm, 1.25 * floor + 250.0, "ms");
    let ratio = conversion.machinen.median() / conversion.mke2fs.median();
    report.target("conversion: at most 1.2 x mke2fs", ratio, 1.2, "x");
    report.target("RSS of the shim: at most 8 MB", footprint.shim_rss_kib as f64 * 1.024 / 1000.0, 8.0, "MB");
    Ok(report)
}
