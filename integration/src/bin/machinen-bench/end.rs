//! Ends of containers: from a kill to the event that containerd's clients wait for.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, process::DEADLINE, samples::Samples};

use crate::{Kind, report::Report};

/// What an end may take longer than one of runc's, ms.
const MORE: f64 = 15.0;

/// `ctr tasks kill` of a container that sleeps, until `ctr events` prints the exit of its task; with clones and runc in turn.
pub(crate) fn measure(
    containerd: &Containerd,
    image: &str,
    configure: impl Fn(Kind) -> Result<()>,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let (mut clone, mut runc) = (Samples::default(), Samples::default());
    configure(Kind::Clone)?;
    for _ in 0..rounds {
        clone.push(end(containerd, image, Kind::Clone)?);
        runc.push(end(containerd, image, Kind::Runc)?);
    }
    report.time("ctr tasks kill to the exit's event, clone", "end_clone_ms", &clone);
    report.time("ctr tasks kill to the exit's event, runc", "end_runc_ms", &runc);
    let more = clone.median() - runc.median();
    report.target("the exit's event: at most 15 ms after runc's", more, MORE, "ms");
    Ok(())
}

fn end(containerd: &Containerd, image: &str, kind: Kind) -> Result<Duration> {
    let before = containerd.inventory()?;
    let events = containerd.ctr(["events"])?.deadline(DEADLINE).spawn()?;
    let run = containerd.run(image, &["sleep", "1000"]).runtime(&kind.runtime());
    let running = run.spawn(DEADLINE)?;
    events.wait_for_stdout("/tasks/start")?;
    let kill = containerd.ctr(["tasks", "kill", "--signal", "KILL", run.container()])?;
    let begun = Instant::now();
    let killing = kill.spawn()?;
    events.wait_for_stdout("/tasks/exit")?;
    let time = begun.elapsed();
    killing.wait()?.ok()?;
    let output = running.wait()?;
    ensure!(output.status == 137, "not killed but {output}");
    drop(events);
    containerd.settle(&before)?;
    Ok(time)
}
