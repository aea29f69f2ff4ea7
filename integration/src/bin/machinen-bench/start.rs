//! Starts: cold and warm with machinen, with runc, and the floor, taking turns.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    paths, phases,
    samples::Samples,
    setup::{Setup, Value},
};

use crate::floor::Floor;

#[derive(Debug, Default)]
pub(crate) struct Starts {
    pub(crate) cold: Samples,
    pub(crate) warm: Samples,
    pub(crate) runc: Samples,
    pub(crate) floor: Samples,
    /// In the order in which the shim tells them first.
    pub(crate) phases: Vec<Phase>,
}

/// One step of a start.
#[derive(Debug, Default)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) cold: Samples,
    pub(crate) warm: Samples,
}

pub(crate) fn measure(containerd: &Containerd, image: &str, floor: &Floor, rounds: usize) -> Result<Starts> {
    let mut starts = Starts::default();
    let warm_cache = containerd.root().join("warm");
    let with_cache = |dir: &std::path::Path| Setup::new().set("rootdisk", "dir", Value::path(dir));
    fs::create_dir(&warm_cache)?;
    containerd.configure(&with_cache(&warm_cache))?;
    // Not counted: fills the cache, and the page cache for all.
    run(containerd, image, &paths::runtime())?;
    run(containerd, image, paths::RUNC)?;
    floor.run()?;
    for round in 0..rounds {
        containerd.configure(&with_cache(&warm_cache))?;
        let (warm, phases) = run_with_phases(containerd, image)?;
        starts.warm.push(warm);
        for (name, time) in phases {
            phase(&mut starts.phases, name).warm.push(time);
        }
        let cold_cache = containerd.root().join(format!("cold-{round}"));
        fs::create_dir(&cold_cache)?;
        containerd.configure(&with_cache(&cold_cache))?;
        let (cold, phases) = run_with_phases(containerd, image)?;
        starts.cold.push(cold);
        for (name, time) in phases {
            phase(&mut starts.phases, name).cold.push(time);
        }
        fs::remove_dir_all(&cold_cache)?;
        starts.runc.push(run(containerd, image, paths::RUNC)?);
        starts.floor.push(floor.run()?);
        eprintln!("round {} of {rounds}", round + 1);
    }
    Ok(starts)
}

fn phase(phases: &mut Vec<Phase>, name: String) -> &mut Phase {
    let at = phases.iter().position(|phase| phase.name == name).unwrap_or_else(|| {
        phases.push(Phase { name, ..Phase::default() });
        phases.len() - 1
    });
    &mut phases[at]
}

/// A start with machinen, and what its shim says of its steps.
fn run_with_phases(containerd: &Containerd, image: &str) -> Result<(Duration, Vec<(String, Duration)>)> {
    let from = containerd.log().position();
    let time = run(containerd, image, &paths::runtime())?;
    let lines = containerd.log().since(from);
    let told = lines.iter().filter_map(|line| phases::parse(line)).flatten();
    Ok((time, told.map(|(name, millis)| (name, Duration::from_secs_f64(millis / 1000.0))).collect()))
}

fn run(containerd: &Containerd, image: &str, runtime: &str) -> Result<Duration> {
    let before = containerd.inventory()?;
    let output = containerd.run(image, &["true"]).runtime(runtime).output()?;
    ensure!(output.status == 0, "{runtime}: {output}");
    // What ends in the background must not slow the next one.
    containerd.settle(&before).context("after a start")?;
    Ok(output.duration)
}
