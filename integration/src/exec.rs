//! `ctr tasks exec`: further processes in a container.

use std::{
    ffi::OsString,
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    containerd::Containerd,
    process::{DEADLINE, Invocation, Output, Running},
};

/// A `ctr tasks exec`, before it runs.
#[derive(Debug, Clone)]
pub struct Exec<'a> {
    containerd: &'a Containerd,
    container: String,
    id: String,
    flags: Vec<OsString>,
    command: Vec<OsString>,
}

impl Containerd {
    /// A process in a running container.
    pub fn exec<'a>(&'a self, container: &str, id: &str, command: &[&str]) -> Exec<'a> {
        Exec {
            containerd: self,
            container: container.to_owned(),
            id: id.to_owned(),
            flags: Vec::new(),
            command: command.iter().map(Into::into).collect(),
        }
    }

    /// Starts a container that only waits, and returns its id.
    ///
    /// # Errors
    /// The container does not start.
    pub fn idle(&self, image: &str, runtime: Option<&str>) -> Result<String> {
        let mut run = self.run(image, &["sleep", "100000"]).detached().flag("--null-io");
        if let Some(runtime) = runtime {
            run = run.runtime(runtime);
        }
        run.ok()?;
        Ok(run.container().to_owned())
    }

    /// Kills and removes a container that was started by [`Containerd::idle`].
    ///
    /// # Errors
    /// A part of the container remains.
    pub fn end(&self, id: &str) -> Result<()> {
        let from = self.log().position();
        self.ctr_ok(&["tasks", "kill", "--signal", "SIGKILL", id])?;
        self.log().wait_for_event(from, "/tasks/exit")?;
        // The event may be another container's: its line does not say whose it is.
        let deadline = Instant::now() + DEADLINE;
        while self.ctr_output(&["tasks", "delete", id])?.error_text().contains("must be stopped") {
            ensure!(Instant::now() < deadline, "{id} does not end");
        }
        self.ctr_ok(&["containers", "delete", id])?;
        Ok(())
    }
}

impl Exec<'_> {
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(Into::into));
        self
    }

    /// The command line.
    ///
    /// # Errors
    /// This release's `ctr` is missing.
    pub fn invocation(&self) -> Result<Invocation> {
        let mut ctr = self.containerd.ctr(["tasks", "exec", "--exec-id"])?.arg(&self.id);
        // ctr accepts only one of the two flags.
        if !self.flags.iter().any(|flag| flag == "--log-uri") {
            ctr = ctr.arg("--fifo-dir").arg(self.containerd.root().join("fifo"));
        }
        Ok(ctr.args(self.flags.clone()).arg(&self.container).args(self.command.clone()))
    }

    /// Runs the process to its end, whatever its status.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output(&self) -> Result<Output> {
        self.invocation()?.run()
    }

    /// Starts the process, for tests that act while it runs.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn spawn(&self, deadline: Duration) -> Result<Running> {
        self.invocation()?.deadline(deadline).spawn()
    }

    /// Runs the process with the bytes, and then EOF, as its stdin.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output_of_stdin(&self, bytes: &[u8]) -> Result<Output> {
        let mut running = self.invocation()?.with_stdin().deadline(DEADLINE).spawn()?;
        let mut stdin = running.stdin().context("no stdin")?;
        stdin.write_all(bytes).context("cannot write to ctr")?;
        drop(stdin);
        running.wait()
    }
}
