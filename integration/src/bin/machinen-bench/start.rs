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
    /// Of the warm starts, in the order in which the shim tells them.
    pub(crate) phases: Vec<(String, Samples)>,
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
        let cold_cache = containerd.root().join(format!("cold-{round}"));
        fs::create_dir(&cold_cache)?;
        containerd.configure(&with_cache(&cold_cache))?;
        starts.cold.push(run(containerd, image, &paths::runtime())?);
        fs::remove_dir_all(&cold_cache)?;
        containerd.configure(&with_cache(&warm_cache))?;
        let from = containerd.log().position();
        starts.warm.push(run(containerd, image, &paths::runtime())?);
        for line in containerd.log().since(from) {
            for (name, millis) in phases::parse(&line).unwrap_or_default() {
                add_phase(&mut starts.phases, name, millis);
            }
        }
        starts.runc.push(run(containerd, image, paths::RUNC)?);
        starts.floor.push(floor.run()?);
        eprintln!("round {} of {rounds}", round + 1);
    }
    Ok(starts)
}

fn add_phase(phases: &mut Vec<(String, Samples)>, name: String, millis: f64) {
    let time = Duration::from_secs_f64(millis / 1000.0);
    match phases.iter_mut().find(|(known, _)| *known == name) {
        Some((_, samples)) => samples.push(time),
        None => {
            let mut samples = Samples::default();
            samples.push(time);
            phases.push((name, samples));
        }
    }
}

fn run(containerd: &Containerd, image: &str, runtime: &str) -> Result<Duration> {
    let before = containerd.inventory()?;
    let output = containerd.run(image, &["true"]).runtime(runtime).output()?;
    ensure!(output.status == 0, "{runtime}: {output}");
    // What ends in the background must not slow the next one.
    containerd.settle(&before).context("after a start")?;
    Ok(output.duration)
}
