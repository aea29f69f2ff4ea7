//! Many starts at once: the time until all are done, and the cost of each.

use std::{thread, time::Instant};

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, samples::Samples};

use crate::{Kind, cpu, report::Report};

/// The number of starts at once.
pub(crate) const WIDTHS: [usize; 3] = [1, 5, 20];

/// This many starts of one kind at once.
#[derive(Debug)]
pub(crate) struct Parallel {
    pub(crate) kind: Kind,
    pub(crate) width: usize,
    /// From the first `ctr` to the end of the last.
    pub(crate) wall: Samples,
    /// Processor time of one start, until everything of it is gone.
    pub(crate) cpu: Samples,
}

impl Parallel {
    pub(crate) fn report(&self, report: &mut Report) {
        let (kind, width) = (self.kind.name(), self.width);
        let key = format!("parallel_{kind}_{width}");
        report.time(format!("{width} at once, {kind}"), format!("{key}_ms"), &self.wall);
        report.time("  processor time of each", format!("{key}_cpu_ms"), &self.cpu);
    }
}

pub(crate) fn measure(
    containerd: &Containerd,
    image: &str,
    configure: impl Fn(Kind) -> Result<()>,
    rounds: usize,
) -> Result<Vec<Parallel>> {
    let kinds = [Kind::Clone, Kind::Boot, Kind::Runc];
    let each = kinds.into_iter().flat_map(|kind| WIDTHS.map(|width| (kind, width)));
    let mut measured: Vec<_> = each
        .map(|(kind, width)| Parallel { kind, width, wall: Samples::default(), cpu: Samples::default() })
        .collect();
    for round in 0..rounds {
        for parallel in &mut measured {
            configure(parallel.kind)?;
            parallel.round(containerd, image)?;
        }
        eprintln!("parallel starts, round {} of {rounds}", round + 1);
    }
    Ok(measured)
}

/// Processor time of each of `width` starts at once, ms.
pub(crate) fn cpu(measured: &[Parallel], kind: Kind, width: usize) -> f64 {
    let of = measured.iter().find(|parallel| parallel.kind == kind && parallel.width == width);
    of.map_or(f64::NAN, |parallel| parallel.cpu.median())
}

impl Parallel {
    fn round(&mut self, containerd: &Containerd, image: &str) -> Result<()> {
        let before = containerd.inventory()?;
        let used = cpu::total(containerd)?;
        let runtime = self.kind.runtime();
        let runs: Vec<_> =
            (0..self.width).map(|_| containerd.run(image, &["true"]).runtime(&runtime)).collect();
        let start = Instant::now();
        let outputs = thread::scope(|scope| {
            let started: Vec<_> = runs.iter().map(|run| scope.spawn(|| run.output())).collect();
            started.into_iter().map(|run| run.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        self.wall.push(start.elapsed());
        for output in outputs {
            ensure!(output.status == 0, "{runtime}: {output}");
        }
        containerd.settle(&before)?;
        let used = cpu::total(containerd)?.saturating_sub(used);
        self.cpu.push(used / u32::try_from(self.width)?);
        Ok(())
    }
}
