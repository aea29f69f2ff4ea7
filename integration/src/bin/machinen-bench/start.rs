//! Starts: by clones, by boots with a warm and a cold cache, with runc, and the floor, taking turns.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, phases, process::DEADLINE, samples::Samples};

use crate::{Kind, floor::Floor, report::Report, setup_of};

#[derive(Debug, Default)]
pub(crate) struct Starts {
    /// A boot, with a rootdisk that has to be made.
    pub(crate) cold: Samples,
    pub(crate) boot: Samples,
    pub(crate) clone: Samples,
    pub(crate) runc: Samples,
    pub(crate) gvisor: Samples,
    pub(crate) floor: Samples,
    /// From the start of a clone's QEMU to its agent's answer.
    pub(crate) agent: Samples,
    /// From the start of `ctr` to the first byte that the container has written.
    pub(crate) first_byte: Samples,
    pub(crate) first_byte_runc: Samples,
    /// In the order in which the shim first reports the steps.
    pub(crate) phases: Vec<Phase>,
}

/// One step of a start.
#[derive(Debug, Default)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) cold: Samples,
    pub(crate) boot: Samples,
    pub(crate) clone: Samples,
}

impl Starts {
    pub(crate) fn report(&self, report: &mut Report) {
        report.time("ctr run --rm true, boot with a cold cache", "start_cold_ms", &self.cold);
        report.time("ctr run --rm true, boot", "start_warm_ms", &self.boot);
        report.time("ctr run --rm true, clone", "start_clone_ms", &self.clone);
        report.time("ctr run --rm true, runc", "start_runc_ms", &self.runc);
        report.time("ctr run --rm true, gVisor", "start_gvisor_ms", &self.gvisor);
        report.time("floor: the same VM boots and powers off", "floor_ms", &self.floor);
        report.time("clone to the agent's answer", "clone_to_agent_ms", &self.agent);
        report.time("to the first byte of output, clone", "first_byte_clone_ms", &self.first_byte);
        report.time("to the first byte of output, runc", "first_byte_runc_ms", &self.first_byte_runc);
        for phase in &self.phases {
            let [cold, boot, clone] =
                [&phase.cold, &phase.boot, &phase.clone].map(|samples| samples.median());
            report.phase(&phase.name, cold, boot, clone);
        }
    }
}

/// The steps of a clone until its agent answers, one after the other.
const TO_AGENT: [&str; 2] = ["vm-launch", "vm-ready"];

pub(crate) fn measure(containerd: &Containerd, image: &str, floor: &Floor, rounds: usize) -> Result<Starts> {
    let mut starts = Starts::default();
    let cache = |name: &str| containerd.root().join(name);
    fs::create_dir(cache("warm"))?;
    // Not counted: fills the rootdisk cache, and the page cache for all kinds.
    for kind in [Kind::Boot, Kind::Clone, Kind::Runc] {
        containerd.configure(&setup_of(containerd, kind, &cache("warm")))?;
        run(containerd, image, kind)?;
    }
    floor.run()?;
    for round in 0..rounds {
        containerd.configure(&setup_of(containerd, Kind::Clone, &cache("warm")))?;
        let (time, phases) = run_with_phases(containerd, image, Kind::Clone)?;
        starts.clone.push(time);
        let to_agent = phases.iter().filter(|(name, _)| TO_AGENT.contains(&name.as_str()));
        starts.agent.push(to_agent.map(|(_, time)| *time).sum());
        starts.note(phases, |phase| &mut phase.clone);
        starts.first_byte.push(first_byte(containerd, image, Kind::Clone)?);

        containerd.configure(&setup_of(containerd, Kind::Boot, &cache("warm")))?;
        let (time, phases) = run_with_phases(containerd, image, Kind::Boot)?;
        starts.boot.push(time);
        starts.note(phases, |phase| &mut phase.boot);

        let cold = cache(&format!("cold-{round}"));
        fs::create_dir(&cold)?;
        containerd.configure(&setup_of(containerd, Kind::Boot, &cold))?;
        let (time, phases) = run_with_phases(containerd, image, Kind::Boot)?;
        starts.cold.push(time);
        starts.note(phases, |phase| &mut phase.cold);
        fs::remove_dir_all(&cold)?;

        starts.runc.push(run(containerd, image, Kind::Runc)?);
        starts.gvisor.push(run(containerd, image, Kind::Gvisor)?);
        starts.first_byte_runc.push(first_byte(containerd, image, Kind::Runc)?);
        starts.floor.push(floor.run()?);
        eprintln!("round {} of {rounds}", round + 1);
    }
    Ok(starts)
}

impl Starts {
    fn note(&mut self, phases: Vec<(String, Duration)>, column: impl Fn(&mut Phase) -> &mut Samples) {
        for (name, time) in phases {
            let at = self.phases.iter().position(|phase| phase.name == name).unwrap_or_else(|| {
                self.phases.push(Phase { name, ..Phase::default() });
                self.phases.len() - 1
            });
            column(&mut self.phases[at]).push(time);
        }
    }
}

/// A start with machinen, and the steps that its shim reports.
fn run_with_phases(
    containerd: &Containerd,
    image: &str,
    kind: Kind,
) -> Result<(Duration, Vec<(String, Duration)>)> {
    let from = containerd.log().position();
    let time = run(containerd, image, kind)?;
    let lines = containerd.log().since(from);
    let wanted = format!("origin={}", if kind == Kind::Clone { "clone" } else { "boot" });
    ensure!(lines.iter().any(|line| line.contains(&wanted)), "the VM was not of {wanted}");
    let steps = lines.iter().filter_map(|line| phases::parse(line)).flatten();
    Ok((time, steps.map(|(name, millis)| (name, Duration::from_secs_f64(millis / 1000.0))).collect()))
}

pub(crate) fn run(containerd: &Containerd, image: &str, kind: Kind) -> Result<Duration> {
    let before = containerd.inventory()?;
    let runtime = kind.runtime();
    let mut command = containerd.run(image, &["true"]).runtime(&runtime);
    if let Some(program) = kind.runc_binary(containerd)? {
        command = command.flag("--runc-binary").flag(program);
    }
    let output = command.output()?;
    ensure!(output.status == 0, "{runtime}: {output}");
    // Background work of a start must not slow the next one.
    containerd.settle(&before).context("after a start")?;
    Ok(output.duration)
}

fn first_byte(containerd: &Containerd, image: &str, kind: Kind) -> Result<Duration> {
    let before = containerd.inventory()?;
    let run = containerd.run(image, &["echo", "x"]).runtime(&kind.runtime());
    let start = std::time::Instant::now();
    let running = run.spawn(DEADLINE)?;
    running.wait_for_stdout("x")?;
    let time = start.elapsed();
    running.wait()?.ok()?;
    containerd.settle(&before).context("after a start")?;
    Ok(time)
}
