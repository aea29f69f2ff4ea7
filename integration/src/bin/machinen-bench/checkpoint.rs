//! Checkpoint and restore of containers with some memory: how long they are frozen, and how soon they run
//! again. Writing is compared with the minimum: a program in the guest that writes the same amount to a fresh
//! disk.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    phases,
    served::Served,
};

use crate::report::Report;

/// Resident memory of the containers, MiB.
const SIZES: [u64; 4] = [8, 64, 256, 1024];
/// From this size on, most of the time is spent on writing, MiB.
const MUCH: u64 = 256;

/// Checkpoints of each size up to the given one; the one with the median is reported.
const ROUNDS: usize = 5;

/// The cost of one size.
#[derive(Debug)]
struct Cost {
    mib: u64,
    /// The duration of the whole call, and the part of it in which criu ran.
    checkpoint: Duration,
    criu: Duration,
    /// How long the container was frozen, and how long another one whose memory had been copied before.
    frozen: Duration,
    frozen_after_copy: Duration,
    /// Create and Start, with all of the memory.
    restore: Duration,
    /// The same, with the memory fetched after the start.
    lazy: Duration,
    bundle_kib: u64,
}

pub(crate) fn measure(containerd: &Containerd, report: &mut Report) -> Result<()> {
    let bundle = Bundle::busybox(containerd)?;
    // Not counted: fills the cache of disks.
    one(containerd, &bundle, 1)?;
    let [small, _, large, largest] = SIZES.map(|mib| {
        let cost = one(containerd, &bundle, mib)?;
        cost.report(report);
        if mib >= MUCH {
            let written = written(containerd, &bundle, mib)?;
            let rate = |time: Duration| (mib << 20) as f64 / 1e6 / time.as_secs_f64();
            let key = |what: &str| format!("checkpoint_{what}_{mib}_mib");
            report.rate("  its memory by the time of the checkpoint", &key("rate"), rate(cost.checkpoint));
            report.rate("  the same amount written to a fresh disk", &key("floor_rate"), rate(written));
        }
        Ok::<_, anyhow::Error>(cost)
    });
    let (small, large, largest) = (small?, large?, largest?);
    let limit = 1.3 * millis(large.criu) + 200.0;
    report.target(
        "checkpoint of 256 MiB: at most 1.3 x CRIU + 200 ms",
        millis(large.checkpoint),
        limit,
        "ms",
    );
    let ratio = millis(largest.lazy) / millis(small.lazy);
    report.target("lazy restore of 1 GiB: at most 1.5 x that of 8 MiB", ratio, 1.5, "x");
    Ok(())
}

impl Cost {
    fn report(&self, report: &mut Report) {
        let mib = self.mib;
        let key = |what: &str| format!("{what}_{mib}_mib");
        report.mean(format!("checkpoint of {mib} MiB"), key("checkpoint_ms"), millis(self.checkpoint));
        report.mean("  of which CRIU itself", key("checkpoint_criu_ms"), millis(self.criu));
        let (frozen, after_copy) = (millis(self.frozen), millis(self.frozen_after_copy));
        report.mean("  of which the container is frozen", key("checkpoint_frozen_ms"), frozen);
        report.mean("  the same after a pre-dump", key("checkpoint_frozen_pre_dump_ms"), after_copy);
        report.mean("  restore of it, Create and Start", key("restore_ms"), millis(self.restore));
        report.mean("  the same, memory fetched later", key("restore_lazy_ms"), millis(self.lazy));
        report.size("  size of the files", key("checkpoint_kib"), self.bundle_kib);
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn one(containerd: &Containerd, bundle: &Bundle, mib: u64) -> Result<Cost> {
    let dir = containerd.root().join("images");
    let Taken { frozen: frozen_after_copy, .. } = take(containerd, &config(bundle, mib, "pre-dump")?, &dir)?;
    fs::remove_dir_all(&dir)?;
    let mut taken = Vec::new();
    for _ in 0..if mib <= MUCH { ROUNDS } else { 1 } {
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        taken.push(take(containerd, &config(bundle, mib, "")?, &dir)?);
    }
    taken.sort_by_key(|taken| taken.took);
    // The parts of a checkpoint belong together, so all of them are of the same round.
    let Taken { took: checkpoint, frozen, criu } = taken.swap_remove(taken.len() / 2);
    let restored = |kind| -> Result<Duration> {
        let mut served = Served::of(containerd, &config(bundle, mib, kind)?)?;
        let begun = Instant::now();
        served.create_from(&dir)?;
        served.begin()?;
        let took = begun.elapsed();
        served.end()?;
        Ok(took)
    };
    let (restore, lazy) = (restored("")?, restored("lazy")?);
    let sizes = fs::read_dir(&dir)?.map(|entry| Ok(entry?.metadata()?.len())).collect::<Result<Vec<_>>>()?;
    fs::remove_dir_all(&dir)?;
    eprintln!("checkpoint of {mib} MiB: {checkpoint:.1?}, restore {restore:.1?}, lazily {lazy:.1?}");
    let bundle_kib = sizes.iter().sum::<u64>() / 1024;
    Ok(Cost { mib, checkpoint, criu, frozen, frozen_after_copy, restore, lazy, bundle_kib })
}

/// How long a program takes to write and sync the same amount to the container's own disk, which is as fresh
/// as a checkpoint's.
fn written(containerd: &Containerd, bundle: &Bundle, mib: u64) -> Result<Duration> {
    let config = bundle.config(&["sleep", "100000"], |spec| {
        spec["annotations"]["io.machinen.rootdisk-size"] = (2 * mib).to_string().into();
    })?;
    let served = Served::run(containerd, &config)?;
    let write = format!("dd if=/dev/zero of=/written bs=1M count={mib} conv=fsync");
    let begun = Instant::now();
    ensure!(served.exec_to("write", &["sh", "-c", &write], "")? == 0, "cannot write {mib} MiB");
    let took = begun.elapsed();
    // The changes that exist at the end are sent to the host.
    ensure!(served.exec_to("remove", &["rm", "/written"], "")? == 0, "cannot remove it");
    served.end()?;
    eprintln!("{mib} MiB written: {took:.1?}");
    Ok(took)
}

/// The duration of the whole call, how long the container is frozen in it, and how long CRIU runs.
struct Taken {
    took: Duration,
    frozen: Duration,
    criu: Duration,
}

fn take(containerd: &Containerd, config: &Path, dir: &Path) -> Result<Taken> {
    let source = Served::run(containerd, config)?;
    let ready = "until [ -e /tmp/ready ]; do usleep 50000; done";
    ensure!(source.exec_to("ready", &["sh", "-c", ready], "")? == 0, "the container does not get ready");
    let request = api::CheckpointTaskRequest {
        id: source.shim.id.clone(),
        path: dir.display().to_string(),
        ..Default::default()
    };
    let begun = Instant::now();
    source.client.ok::<api::Empty>("Checkpoint", &request)?;
    let took = begun.elapsed();
    let log = source.shim.log()?;
    let line = log.lines().find(|line| line.contains("container checkpointed")).context("no line of it")?;
    let phases = phases::parse(line).with_context(|| format!("no phases on {line}"))?;
    let phase = |wanted: &str| -> Result<Duration> {
        let (_, millis) = phases.iter().find(|(name, _)| name == wanted).context("no such phase")?;
        Ok(Duration::from_secs_f64(millis / 1000.0))
    };
    source.end()?;
    Ok(Taken { took, frozen: phase("frozen")?, criu: phase("criu")? })
}

/// tail keeps all that it would print at the end of its input, which does not come.
fn config(bundle: &Bundle, mib: u64, wanted: &str) -> Result<PathBuf> {
    let script = format!("(head -c {mib}m /dev/zero; touch /tmp/ready; exec sleep 100000) | tail -c {mib}m");
    bundle.config(&["sh", "-c", &script], |spec| {
        if !wanted.is_empty() {
            spec["annotations"][format!("io.machinen.{wanted}")] = "true".into();
        }
        spec["mounts"].as_array_mut().expect("an array").push(mount(
            "/tmp",
            "tmpfs",
            "tmpfs",
            &["mode=1777"],
        ));
    })
}
