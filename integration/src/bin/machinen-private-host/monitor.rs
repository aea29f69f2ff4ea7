//! What conmon is for a runtime: a subreaper that runs the runtime, and then waits for the process that the runtime has
//! left and whose pid it has written to a file.
//!
//! The runtime inherits the standard streams. Lines about the events go to a file, usually a FIFO:
//! `runtime STATUS`, and after a status of 0 `container PID STATUS`.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use nix::{
    sys::{
        prctl::set_child_subreaper,
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

pub(crate) fn monitor(reports: &Path, pid_file: &Path, program: &[&str]) -> Result<()> {
    set_child_subreaper(true).context("cannot become a subreaper")?;
    let mut reports = OpenOptions::new()
        .write(true)
        .open(reports)
        .with_context(|| format!("cannot open {}", reports.display()))?;
    #[expect(clippy::disallowed_methods, reason = "this program is the supervisor")]
    let status = Command::new(program[0]).args(&program[1..]).status();
    let status = status.with_context(|| format!("cannot run {}", program[0]))?;
    report(&mut reports, &format!("runtime {}", status.code().unwrap_or(-1)))?;
    if !status.success() {
        return Ok(());
    }
    let text = fs::read_to_string(pid_file);
    let text = text.with_context(|| format!("cannot read {}", pid_file.display()))?;
    let pid: i32 = text.parse().with_context(|| format!("{text:?} is not a pid"))?;
    let status = match waitpid(Pid::from_raw(pid), None) {
        Ok(WaitStatus::Exited(_, status)) => status.to_string(),
        Ok(WaitStatus::Signaled(_, signal, _)) => (128 + signal as i32).to_string(),
        other => format!("{other:?}"),
    };
    report(&mut reports, &format!("container {pid} {status}"))
}

fn report(reports: &mut File, line: &str) -> Result<()> {
    // By one call, so that a reader never sees half a line.
    reports.write_all(format!("{line}\n").as_bytes()).context("cannot report")
}
