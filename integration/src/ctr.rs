//! `ctr`, containerd's command line, against a private containerd.

use std::{ffi::OsString, io::Write, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::{
    containerd::Containerd,
    image::Image,
    paths,
    process::{DEADLINE, Invocation, Output, Running},
};

impl Containerd {
    /// A `ctr` command line with address and namespace filled in.
    ///
    /// # Errors
    /// This release's `ctr` is missing.
    pub fn ctr<I: IntoIterator<Item = A>, A: Into<OsString>>(&self, args: I) -> Result<Invocation> {
        Ok(Invocation::new(paths::containerd_program(self.version(), "ctr")?)
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", self.namespace()])
            .env("TMPDIR", self.root().join("tmp"))
            .args(args))
    }

    /// Runs `ctr`, whatever its status.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn ctr_output(&self, args: &[&str]) -> Result<Output> {
        self.ctr(args)?.run()
    }

    /// Runs `ctr` and returns its output.
    ///
    /// # Errors
    /// The program failed; both of its streams are quoted.
    pub fn ctr_ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.ctr(args)?.run()?.ok()?.text())
    }

    /// Writes the image to an archive and imports it.
    ///
    /// # Errors
    /// One of the two failed.
    pub fn import(&self, image: &Image) -> Result<()> {
        let archive = self.root().join("image.tar");
        image.write(&archive)?;
        self.ctr(["images", "import"])?.arg(&archive).run()?.ok()?;
        std::fs::remove_file(&archive)?;
        Ok(())
    }

    /// `ctr run` of a new container of an imported image.
    pub fn run<'a>(&'a self, image: &str, command: &[&str]) -> Run<'a> {
        Run {
            containerd: self,
            verb: vec!["run".into(), "--rm".into()],
            flags: Vec::new(),
            subject: Some(image.into()),
            id: self.new_id(),
            command: command.iter().map(Into::into).collect(),
            stdin: false,
            runtime: paths::runtime(),
        }
    }

    /// `ctr run` of a container with the caller's specification (config.json).
    pub fn run_spec<'a>(&'a self, config: &Path) -> Run<'a> {
        let run = self.run("", &[]).flag("--config").flag(config);
        Run { subject: None, ..run }
    }
}

/// A `ctr run`, before it runs.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    containerd: &'a Containerd,
    verb: Vec<OsString>,
    flags: Vec<OsString>,
    subject: Option<OsString>,
    id: String,
    command: Vec<OsString>,
    stdin: bool,
    runtime: String,
}

impl Run<'_> {
    pub fn flag(mut self, flag: impl Into<OsString>) -> Self {
        self.flags.push(flag.into());
        self
    }

    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(Into::into));
        self
    }

    pub fn id(mut self, id: &str) -> Self {
        self.containerd.note_id(id);
        id.clone_into(&mut self.id);
        self
    }

    pub fn runtime(mut self, runtime: &str) -> Self {
        self.runtime = runtime.to_owned();
        self
    }

    /// Gives the container a stdin that the caller writes to; see [`Running::stdin`].
    pub fn with_stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Leaves the container running in the background (`--detach` excludes `--rm`).
    pub fn detached(mut self) -> Self {
        self.verb = vec!["run".into(), "--detach".into()];
        self
    }

    /// Leaves the container and its snapshot behind.
    pub fn kept(mut self) -> Self {
        self.verb = vec!["run".into()];
        self
    }

    /// The command line.
    ///
    /// # Errors
    /// This release's `ctr` is missing.
    pub fn invocation(&self) -> Result<Invocation> {
        let mut ctr = self
            .containerd
            .ctr(self.verb.clone())?
            .args(["--runtime", &self.runtime, "--fifo-dir"])
            .arg(self.containerd.root().join("fifo"))
            .args(self.flags.clone())
            .args(self.subject.clone())
            .arg(&self.id)
            .args(self.command.clone());
        if self.stdin {
            ctr = ctr.with_stdin();
        }
        Ok(ctr)
    }

    /// Runs the container to its end, whatever its status.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output(&self) -> Result<Output> {
        self.invocation()?.run()
    }

    /// Runs the container and returns its output.
    ///
    /// # Errors
    /// The program failed; both streams are quoted.
    pub fn ok(&self) -> Result<String> {
        Ok(self.output()?.ok()?.text())
    }

    /// Runs the container with the bytes, and then EOF, as its stdin.
    ///
    /// The bytes are there before ctr starts: ctr has read all of them, and their end, long before the
    /// container runs.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output_of_stdin(self, bytes: &[u8]) -> Result<Output> {
        let mut running = self.with_stdin().spawn(DEADLINE)?;
        let mut stdin = running.stdin().context("no stdin")?;
        stdin.write_all(bytes).context("cannot write to ctr")?;
        drop(stdin);
        running.wait()
    }

    /// Starts the container, for tests that act while it runs.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn spawn(&self, deadline: Duration) -> Result<Running> {
        self.invocation()?.deadline(deadline).spawn()
    }

    /// Id of the container.
    pub fn container(&self) -> &str {
        &self.id
    }
}
