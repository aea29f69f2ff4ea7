//! The Podman of Debian bookworm, whose networks are made by CNI's plugins.

use anyhow::{Result, ensure};
use machinen_integration::{
    podman::{Podman, PodmanCommands as _, Version},
    runtime::Runtime,
};

use super::{network, start};
use crate::harness::IMAGE;

/// Makes a test with each runtime of each function `fn(&Podman) -> Result<()>`, given by its path.
macro_rules! with_older_podman {
    ($($name:ident: $test:path),* $(,)?) => {
        mod runc { $(#[test] fn $name() { super::run(super::Runtime::Runc, $test); })* }
        mod machinen { $(#[test] fn $name() { super::run(super::Runtime::Machinen, $test); })* }
    };
}

with_older_podman!(
    a_life_in_the_background: crate::podman::a_life_in_the_background,
    exit_codes: crate::podman::exit_codes,
    the_default_bridge: super::network::the_default_bridge,
    published_ports: super::network::published_ports,
    a_pod: super::a_pod,
);

fn run(runtime: Runtime, test: fn(&Podman) -> Result<()>) {
    super::run(Version::V4, runtime, test);
}

fn a_pod(podman: &Podman) -> Result<()> {
    podman.ok(&["pod", "create", "--name", "pod", "-p", "8080:80"])?;
    let server = ["nc", "-ll", "-p", "80", "-e", "echo", "served"];
    podman.ok(&[&["run", "-d", "--pod", "pod", "--name", "server", IMAGE], &server[..]].concat())?;
    ensure!(network::from_port(podman, "127.0.0.1", 8080)? == "served");
    start(podman, "other", &[], "sleep 1000")?;
    super::remove(podman, "other")?;
    podman.ok(&["pod", "rm", "--force", "--time", "0", "pod"]).map(drop)
}
