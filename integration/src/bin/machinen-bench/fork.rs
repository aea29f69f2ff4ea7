//! `machinen fork` of a running container, up to the start of the fork, and the share of the checkpoint.

use std::time::Duration;

use anyhow::{Context, Result};
use machinen_integration::{containerd::Containerd, phases, samples::Samples};

#[derive(Debug, Default)]
pub(crate) struct Forks {
    pub(crate) whole: Samples,
    /// The container's memory dumped, read by the host and written.
    pub(crate) dump: Samples,
}

/// The steps of a checkpoint, one after the other.
const PHASES: [&str; 2] = ["dump", "save"];

pub(crate) fn measure(containerd: &Containerd, image: &str, rounds: usize) -> Result<Forks> {
    let mut forks = Forks::default();
    let source = containerd.idle(image, None)?;
    // The first fork finds cold caches and is not counted.
    for round in 0..=rounds {
        let (new, from) = (containerd.new_id(), containerd.log().position());
        let fork = containerd.machinen(&["fork"])?.arg("--address").arg(containerd.socket());
        let fork = fork.args(["--namespace", containerd.namespace(), &source, &new]).run()?.ok()?;
        let lines = containerd.log().since(from);
        let line = lines.iter().find(|line| line.contains("container checkpointed"));
        let phases = line.and_then(|line| phases::parse(line)).context("no line of the checkpoint")?;
        if round > 0 {
            forks.whole.push(fork.duration);
            let counted = phases.iter().filter(|(name, _)| PHASES.contains(&name.as_str()));
            let millis: f64 = counted.map(|(_, millis)| millis).sum();
            forks.dump.push(Duration::from_secs_f64(millis / 1000.0));
        }
        containerd.end(&new)?;
    }
    containerd.end(&source)?;
    Ok(forks)
}
