//! The network: what a start costs more with one, and how fast a container sends, compared with runc in the same run.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use machinen_integration::{
    containerd::Containerd,
    lab::{Lab, PEER},
    process::DEADLINE,
    samples::Samples,
};

use crate::{Kind, report::Report, setup_of};

const PORT: &str = "7002";
const MIB: u64 = 1 << 20;

/// How much is sent at once: about a second's worth.
fn amount(kind: Kind) -> u64 {
    if kind == Kind::Runc { 2048 } else { 128 }
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
    let (mut with, mut without) = (Samples::default(), Samples::default());
    // Not counted: fills the caches.
    start(containerd, image, None)?;
    for round in 0..rounds {
        without.push(start(containerd, image, None)?);
        with.push(start(containerd, image, Some(&lab))?);
        eprintln!("starts with a network: round {} of {rounds}", round + 1);
    }
    report.time("ctr run --rm true, clone, without a network", "start_no_network_ms", &without);
    report.time("  the same with a network", "start_network_ms", &with);

    let sink =
        lab.start_in_peer(&["busybox", "nc", "-ll", "-p", PORT, "-e", "dd", "of=/dev/null", "bs=64k"])?;
    let (mut ours, mut runcs) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        for (kind, samples) in [(Kind::Clone, &mut ours), (Kind::Runc, &mut runcs)] {
            samples.push(send(containerd, image, &lab, kind)?);
        }
    }
    drop(sink);
    let rate = |kind, samples: &Samples| (amount(kind) * MIB) as f64 / 1e6 / (samples.median() / 1e3);
    let (ours, runcs) = (rate(Kind::Clone, &ours), rate(Kind::Runc, &runcs));
    report.rate("TCP from a container to its neighbour", "network_send_rate", ours);
    report.rate("  the same with runc", "network_send_rate_runc", runcs);
    report.share("  as a share of that", "network_send_share", ours / runcs);
    Ok(())
}

fn start(containerd: &Containerd, image: &str, lab: Option<&Lab>) -> Result<Duration> {
    let before = containerd.inventory()?;
    let mut run = containerd.run(image, &["true"]);
    if let Some(lab) = lab {
        run = run.flag(lab.flag());
    }
    let output = run.output()?;
    ensure!(output.status == 0, "{output}");
    containerd.settle(&before).context("after a start")?;
    Ok(output.duration)
}

/// The time that a container takes to send the amount, by its own clock.
fn send(containerd: &Containerd, image: &str, lab: &Lab, kind: Kind) -> Result<Duration> {
    let before = containerd.inventory()?;
    let mib = amount(kind);
    // The program writes to the socket itself: nc copies a KiB at a time.
    let script = format!(
        "until nc {PEER} {PORT} < /dev/null > /dev/null; do sleep 0.1; done; cut -d ' ' -f 1 /proc/uptime; \
         nc {PEER} {PORT} -e dd if=/dev/zero bs=64k count={} 2>&1 | head -n 1; cut -d ' ' -f 1 /proc/uptime",
        mib * 16
    );
    let run = containerd.run(image, &["sh", "-c", &script]).runtime(&kind.runtime()).flag(lab.flag());
    let printed = run.spawn(DEADLINE)?.wait()?.ok()?.text();
    let lines: Vec<_> = printed.lines().collect();
    let &[from, counted, to] = lines.as_slice() else { anyhow::bail!("odd output: {printed}") };
    ensure!(counted.starts_with(&format!("{}+0 records", mib * 16)), "not all was sent: {printed}");
    containerd.settle(&before).context("after a transfer")?;
    let seconds = to.parse::<f64>()? - from.parse::<f64>()?;
    eprintln!("{mib} MiB sent with {} in {seconds:.2} s", kind.name());
    Ok(Duration::from_secs_f64(seconds.max(0.01)))
}
