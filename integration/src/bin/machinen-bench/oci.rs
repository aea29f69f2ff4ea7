//! The OCI command line: `run` and `exec` of `machinen` and of runc, in the same run.

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
    let ours = Measured::start(Oci::start_with(Runtime::Machinen, &setup)?)?;
    let runcs = Measured::start(Oci::start(Runtime::Runc)?)?;
    let (mut ours, mut runcs) = (ours, runcs);
    for round in 0..rounds {
        for measured in [&mut ours, &mut runcs] {
            measured.round()?;
        }
        eprintln!("OCI command line: round {} of {rounds}", round + 1);
    }
    report.time("machinen run true, clone", "oci_run_ms", &ours.run);
    report.time("  runc run true", "oci_run_runc_ms", &runcs.run);
    report.share("  as a share of that", "oci_run_share", ours.run.median() / runcs.run.median());
    report.time("machinen exec true", "oci_exec_ms", &ours.exec);
    report.time("  runc exec true", "oci_exec_runc_ms", &runcs.exec);
    report.share("  as a share of that", "oci_exec_share", ours.exec.median() / runcs.exec.median());
    for measured in [ours, runcs] {
        measured.oci.ok(&["delete", "--force", SLEEPER])?;
    }
    Ok(())
}

/// The container in which processes are added.
const SLEEPER: &str = "sleeper";

struct Measured {
    oci: Oci,
    run: Samples,
    exec: Samples,
}

impl Measured {
    fn start(oci: Oci) -> Result<Self> {
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
