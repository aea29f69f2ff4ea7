//! What a start costs more with a network and with volumes, and what it takes with runc then.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{containerd::Containerd, lab::Lab, samples::Samples};

use crate::{Kind, report::Report, setup_of};

/// The number of volumes, which are directories.
const VOLUMES: usize = 3;

/// A kind of starts: its row in the table and that row's key.
struct Row {
    title: &'static str,
    key: &'static str,
    kind: Kind,
    network: bool,
    volumes: usize,
    samples: Samples,
}

fn row(title: &'static str, key: &'static str, kind: Kind, network: bool, volumes: usize) -> Row {
    Row { title, key, kind, network, volumes, samples: Samples::default() }
}

pub(crate) fn measure(
    containerd: &Containerd,
    image: &str,
    cache: &Path,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    containerd.configure(&setup_of(containerd, Kind::Clone, cache))?;
    let lab = Lab::wired()?;
    let title = "ctr run --rm true, clone, without a network";
    let mut rows = [
        row(title, "start_no_network_ms", Kind::Clone, false, 0),
        row("  the same with a network", "start_network_ms", Kind::Clone, true, 0),
        row("  the same with a network and 3 volumes", "start_volumes_ms", Kind::Clone, true, VOLUMES),
        row("  runc with a network and 3 volumes", "start_volumes_runc_ms", Kind::Runc, true, VOLUMES),
    ];
    // The first is not counted: it fills the caches.
    for round in 0..=rounds {
        for row in &mut rows {
            let taken = start(containerd, image, &lab, row)?;
            if round > 0 {
                row.samples.push(taken);
            }
        }
        eprintln!("starts with a network and volumes: round {round} of {rounds}");
    }
    for row in &rows {
        report.time(row.title, row.key, &row.samples);
    }
    let [without, _, with, _] = &rows;
    let more = with.samples.median() - without.samples.median();
    report.target("a network and 3 volumes: at most 40 ms more", more, 40.0, "ms");
    Ok(())
}

fn start(containerd: &Containerd, image: &str, lab: &Lab, row: &Row) -> Result<Duration> {
    let before = containerd.inventory()?;
    let mut run = containerd.run(image, &["true"]).runtime(&row.kind.runtime());
    if row.network {
        run = run.flag(lab.flag());
    }
    for number in 0..row.volumes {
        let volume = containerd.root().join(format!("volume-{number}"));
        fs::create_dir_all(&volume)?;
        let source = volume.display();
        run = run.flag(format!("--mount=type=bind,src={source},dst=/volumes/{number},options=rbind:rw"));
    }
    let output = run.output()?;
    ensure!(output.status == 0, "{output}");
    containerd.settle(&before).context("after a start")?;
    Ok(output.duration)
}
