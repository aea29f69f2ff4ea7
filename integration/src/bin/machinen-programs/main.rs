//! `make test-programs`: common programs, from their start to a fork of them.
//!
//! A program is a file in `integration/programs`. Each is started, used, asked for its limits, checkpointed,
//! restored, forked, stopped and started again, in a microVM and, as far as runc supports it, by runc. A step
//! that fails must be one that the program's file lists as refused, with that text; a table of all steps
//! comes last.

mod image;
mod program;
mod report;
mod steps;

use std::{fs, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use machinen_integration::{
    containerd::Containerd,
    paths::{self, Version},
    setup::Setup,
    templates::Templates,
};

use image::Images;
use program::{Program, Runtime};
use report::Report;

/// Runs real programs in microVMs and with runc, through their whole life.
#[derive(Debug, Parser)]
struct Args {
    /// Programs to run, by name; all if none is named
    programs: Vec<String>,
    /// Run only the programs of the small image
    #[arg(long, conflicts_with = "programs")]
    short: bool,
    /// Show the programs and end
    #[arg(long)]
    list: bool,
    /// Run each program with this runtime only
    #[arg(long, value_enum)]
    only: Option<Runtime>,
    /// Release line of containerd
    #[arg(long, value_enum, default_value_t = Release::V2_1)]
    containerd: Release,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Release {
    #[value(name = "1.6")]
    V1_6,
    #[value(name = "1.7")]
    V1_7,
    #[value(name = "2.1")]
    V2_1,
}

/// The image of the short form.
const SHORT: &str = "short";

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("machinen-programs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every step that should succeed has succeeded.
fn run(args: &Args) -> Result<bool> {
    let all = program::load()?;
    let chosen = choose(&all, args)?;
    if args.list {
        for program in chosen {
            println!("{:<12} {:<7} {}", program.name, program.image, program.about);
        }
        return Ok(true);
    }
    let version = match args.containerd {
        Release::V1_6 => Version::V1_6,
        Release::V1_7 => Version::V1_7,
        Release::V2_1 => Version::V2_1,
    };
    let mut images = Images::new(&all);
    for program in &chosen {
        images.make(&program.image)?;
    }
    let containerd = Containerd::start_with(version, &setup())?;
    let report = walk_all(&containerd, &mut images, &chosen, args.only)?;
    println!("{report}");
    let file = report.save()?;
    let log = file.with_file_name("containerd.log");
    fs::write(&log, containerd.log().to_string())
        .with_context(|| format!("cannot write {}", log.display()))?;
    println!("written to {}; containerd's log is {}", file.display(), log.display());
    Ok(report.passed())
}

/// runc finds CRIU in the directory in which `make setup` has installed it.
fn setup() -> Setup {
    Setup::new().programs(&steps::criu_dir())
}

fn choose<'a>(all: &'a [Program], args: &Args) -> Result<Vec<&'a Program>> {
    for name in &args.programs {
        let known = || all.iter().map(|program| program.name.as_str()).collect::<Vec<_>>().join(", ");
        ensure!(all.iter().any(|program| program.name == *name), "no program {name}; there are {}", known());
    }
    let wanted = |program: &&Program| {
        (args.programs.is_empty() || args.programs.contains(&program.name))
            && (!args.short || program.image == SHORT)
    };
    Ok(all.iter().filter(wanted).collect())
}

fn walk_all(
    containerd: &Containerd,
    images: &mut Images,
    programs: &[&Program],
    only: Option<Runtime>,
) -> Result<Report> {
    let templates = containerd.root().join(Templates::DIR);
    containerd.configure(&setup().templates(&templates, "use"))?;
    let template = Templates::new(containerd)?;
    if only != Some(Runtime::Runc) && paths::runtime() != paths::RUNC {
        println!("building a template");
        template.build()?;
    }
    let mut report = Report::default();
    for (number, program) in programs.iter().enumerate() {
        println!("== {} of {}: {}, {}", number + 1, programs.len(), program.name, program.about);
        let image = images.import(containerd, &program.image)?;
        for runtime in [Runtime::Machinen, Runtime::Runc] {
            if only.is_none_or(|only| only == runtime) {
                report.add(steps::walk(containerd, program, runtime, &image));
            }
        }
    }
    template.remove_all()?;
    Ok(report)
}
