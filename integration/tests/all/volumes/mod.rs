//! Volumes: bind mounts of the host's files and directories.

mod cached;
mod checkpoint;
mod copies;
mod disks;
mod escape;
mod files;
mod life;
mod mounts;
mod refused;
mod replaced;
mod restored;
mod sockets;

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use machinen_integration::{
    bundle::{Bundle, mount},
    containerd::Containerd,
    served::Served,
};
use serde_json::Value;

/// A directory of the host that a test mounts. containerd's own directory, which contains it, is removed at the end.
fn source(containerd: &Containerd) -> Result<PathBuf> {
    let dir = containerd.root().join(format!("volume-{}", containerd.new_id()));
    fs::create_dir(&dir)?;
    Ok(dir)
}

/// Adds a bind mount to a specification.
fn bind(spec: &mut Value, source: &std::path::Path, destination: &str, options: &[&str]) {
    let options: Vec<_> = ["rbind"].iter().chain(options).copied().collect();
    let added = mount(destination, "bind", &source.display().to_string(), &options);
    spec["mounts"].as_array_mut().expect("an array").push(added);
}

/// Runs a shell script in a container of its own with `/data`, and returns what it printed.
fn run(containerd: &Containerd, bundle: &Bundle, data: &std::path::Path, script: &str) -> Result<String> {
    let config = bundle.config(&["sh", "-ec", script], |spec| bind(spec, data, "/data", &[]))?;
    containerd.run_spec(&config).ok()
}

/// A container that waits, with `/data`.
fn served<'a>(containerd: &'a Containerd, data: &std::path::Path) -> Result<Served<'a>> {
    let bundle = Bundle::busybox(containerd)?;
    Served::run(containerd, &bundle.config(&["sleep", "1000"], |spec| bind(spec, data, "/data", &[]))?)
}

/// Runs a shell script that must succeed in a container.
fn shell(served: &Served<'_>, script: &str) -> Result<String> {
    let (status, text) = served.shell(&format!("exec 2>&1; set -e; {script}"))?;
    ensure!(status == 0, "status {status} of {script}: {text}");
    Ok(text)
}
