//! The OCI command line: `run` and `exec` of `machinen` and of runc, crun and runsc, in the same run.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use machinen_integration::{containerd::Containerd, oci::Oci, runtime::Runtime, samples::Samples};

use crate::{Kind, report::Report, setup_of};

pub(crate) fn measure(
    containerd: &Containerd,
    cache: &Path,
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let setup = setup_of(containerd, Kind::Clone, cache);
    let mut all = Vec::new();
    for (runtime, ..) in OTHERS {
        all.push(Measured::start(Oci::start(runtime)?)?);
    }
    let mut ours = Measured::start(Oci::start_with(Runtime::Machinen, &setup)?)?;
    for round in 0..rounds {
        ours.round()?;
        all.iter_mut().try_for_each(Measured::round)?;
        eprintln!("OCI command line: round {} of {rounds}", round + 1);
    }
    report.time("machinen run true, clone", "oci_run_ms", &ours.run);
    for (other, (_, [line, key, share], _)) in all.iter().zip(OTHERS) {
        report.time(line, key, &other.run);
        report.share("  as a share of that", share, ours.run.median() / other.run.median());
    }
    report.time("machinen exec true", "oci_exec_ms", &ours.exec);
    for (other, (_, _, [line, key, share])) in all.iter().zip(OTHERS) {
        report.time(line, key, &other.exec);
        report.share("  as a share of that", share, ours.exec.median() / other.exec.median());
    }
    for measured in all.into_iter().chain([ours]) {
        measured.oci.ok(&["delete", "--force", SLEEPER])?;
    }
    Ok(())
}

/// A line of the report and the names of its two values.
type Row = [&'static str; 3];

/// The runtimes that machinen is compared with, and their rows for `run` and `exec`.
const OTHERS: [(Runtime, Row, Row); 3] = [
    (
        Runtime::Runc,
        ["  runc run true", "oci_run_runc_ms", "oci_run_share"],
        ["  runc exec true", "oci_exec_runc_ms", "oci_exec_share"],
    ),
    (
        Runtime::Crun,
        ["  crun run true", "oci_run_crun_ms", "oci_run_crun_share"],
        ["  crun exec true", "oci_exec_crun_ms", "oci_exec_crun_share"],
    ),
    (
        Runtime::Runsc,
        ["  runsc run true (systrap, no network)", "oci_run_runsc_ms", "oci_run_runsc_share"],
        ["  runsc exec true", "oci_exec_runsc_ms", "oci_exec_runsc_share"],
    ),
];

/// Where hosts with cgroups of version 1 may have those of version 2, too.
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// The container in which processes are added.
const SLEEPER: &str = "sleeper";

struct Measured {
    oci: Oci,
    run: Samples,
    exec: Samples,
}

impl Measured {
    fn start(oci: Oci) -> Result<Self> {
        if oci.runtime() == Runtime::Crun && Path::new(UNIFIED).is_dir() {
            // crun refuses a host that has cgroups of both versions. The mounts are this bench's own.
            oci.host().program("umount")?.arg(UNIFIED).run()?.ok()?;
        }
        oci.bundle("once", &["true"], |_| {})?;
        oci.bundle(SLEEPER, &["sleep", "100000"], |_| {})?;
        // Its streams end here, and the container does not.
        drop(oci.launch(SLEEPER)?);
        let mut measured = Self { oci, run: Samples::default(), exec: Samples::default() };
        // Not counted: fills the caches.
        measured.time(&["run", "--bundle", &measured.bundle(), "once"])?;
        measured.run = Samples::default();
        Ok(measured)
    }

    fn bundle(&self) -> String {
        self.oci.host().root().join("bundle-once").display().to_string()
    }

    fn round(&mut self) -> Result<()> {
        let run = self.time(&["run", "--bundle", &self.bundle(), "once"])?;
        self.run.push(run);
        let exec = self.time(&["exec", SLEEPER, "true"])?;
        self.exec.push(exec);
        Ok(())
    }

    fn time(&self, args: &[&str]) -> Result<Duration> {
        let output = self.oci.output(args)?;
        ensure!(output.status == 0, "{output}");
        Ok(output.duration)
    }
}
