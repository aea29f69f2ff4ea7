//! The paths of what `make setup` and `make build` have installed and built.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// Runtime that the tests exercise: `io.machinen.v1`, or the value of `MACHINEN_TEST_RUNTIME`
/// (`io.containerd.runc.v2` shows that a test demands nothing that runc does not do).
pub fn runtime() -> String {
    env::var("MACHINEN_TEST_RUNTIME").unwrap_or_else(|_| "io.machinen.v1".to_owned())
}

/// The runtime that machinen is compared with.
pub const RUNC: &str = "io.containerd.runc.v2";

/// A containerd release line that `make setup` provides in `target/containerd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1_6,
    V1_7,
    V2_1,
}

impl Version {
    /// Every release line, oldest first.
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2_1];

    /// As the directory in `target/containerd` is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

/// The checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a directory of the workspace")
}

/// One of the containerd release's programs, `containerd` or `ctr`.
///
/// # Errors
/// The program is missing: `make setup` has not run.
pub fn containerd_program(version: Version, program: &str) -> Result<PathBuf> {
    let path = workspace().join("target/containerd").join(version.name()).join("bin").join(program);
    ensure!(path.exists(), "{} is missing: run `make setup`", path.display());
    Ok(path)
}

/// One of Docker's programs, in `sbin` or `bin`.
///
/// # Errors
/// The program is missing: `make setup` has not run.
pub fn docker_program(dir: &str, program: &str) -> Result<PathBuf> {
    let path = workspace().join("target/tools/docker").join(dir).join(program);
    ensure!(path.exists(), "{} is missing: run `make setup`", path.display());
    Ok(path)
}

/// The network plugins of Debian.
///
/// # Errors
/// They are missing: `make setup` has not run.
pub fn cni_plugins() -> Result<PathBuf> {
    let path = workspace().join("target/tools/cni");
    ensure!(path.join("bridge").exists(), "{} is missing: run `make setup`", path.display());
    Ok(path)
}

/// A program of this crate, built by cargo next to the running one.
///
/// # Errors
/// The program has not been built.
pub fn own_program(name: &str) -> Result<PathBuf> {
    let exe = env::current_exe().context("cannot find the running program")?;
    // Tests run from `deps/`, programs from the directory above.
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not next to {}: build the whole crate", exe.display()))
}

/// Directory of the release build of the shim and the command line.
///
/// It is next to the running program's profile directory, so that `CARGO_TARGET_DIR` is honoured.
///
/// # Errors
/// The shim has not been built.
pub fn release_dir() -> Result<PathBuf> {
    let exe = env::current_exe().context("cannot find the running program")?;
    exe.ancestors()
        .map(|dir| dir.join("release"))
        .chain([workspace().join("target/release")])
        .find(|dir| dir.join("containerd-shim-machinen-v1").is_file())
        .context("containerd-shim-machinen-v1 is not built: run `make build`")
}

/// The guest's agent, built by `make guest-image`.
///
/// # Errors
/// The agent has not been built.
pub fn agent() -> Result<PathBuf> {
    let target = release_dir()?.join("..");
    let triple = "x86_64-unknown-linux-gnu/release/machinen-agent";
    [target, workspace().join("target")]
        .into_iter()
        .map(|dir| dir.join(triple))
        .find(|path| path.is_file())
        .context("machinen-agent is not built: run `make guest-image`")
}

/// Kernel and guest image.
pub fn assets() -> PathBuf {
    workspace().join("target/guest")
}

/// Programs that setup has installed for machinen next to the checkout's other artefacts.
pub fn tools() -> PathBuf {
    workspace().join("target/tools/bin")
}
