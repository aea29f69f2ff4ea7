//! What tests do with a `podman` command line, whosever Podman that is.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    image::Image,
    process::{Invocation, Output},
};

/// A Podman that has a command line.
pub trait PodmanCommands {
    /// A `podman` command line.
    ///
    /// # Errors
    /// `make setup` has not run, or the programs of this crate have not been built.
    fn podman(&self, args: &[&str]) -> Result<Invocation>;

    /// A directory in which this Podman may read files of the test.
    fn exchange(&self) -> PathBuf;

    /// Runs `podman`, whatever its status.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    fn output(&self, args: &[&str]) -> Result<Output> {
        self.podman(args)?.run()
    }

    /// Runs `podman`, and returns what it prints without the last line end.
    ///
    /// # Errors
    /// The program failed; both of its streams are quoted.
    fn ok(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?.ok().with_context(|| format!("podman {}", args.join(" ")))?;
        Ok(output.text().trim_end().to_owned())
    }

    /// # Errors
    /// The image cannot be written or loaded.
    fn load(&self, image: &Image) -> Result<()> {
        let archive = self.exchange().join("image.tar");
        image.write(&archive)?;
        let loaded = self.ok(&["load", "--quiet", "--input", &archive.display().to_string()])?;
        ensure!(loaded.ends_with(image.name()), "the image {} was loaded as {loaded:?}", image.name());
        fs::remove_file(&archive).context("cannot remove the archive of an image")
    }
}
