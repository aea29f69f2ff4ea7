//! A private Podman, with its programs of one Debian release, on a host of its own.
//!
//! It is configured as on a host on which it is installed, by the files in `/etc/containers`, so that each of its
//! processes finds the same configuration without an environment: conmon starts podman again after a container's end.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

pub use crate::podman_commands::PodmanCommands;
use crate::{
    inventory::{self, Inventory},
    paths,
    private_host::{PrivateHost, nothing_of},
    process::Invocation,
    runtime::Runtime,
    setup::Setup,
};

/// A Debian release's Podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// bookworm's, with networks by CNI's plugins.
    V4,
    /// trixie's, with networks by netavark and aardvark-dns.
    V5,
}

/// Directories below the host's root in which containers must leave nothing.
const STORAGE: [&str; 3] = ["storage/overlay", "storage/overlay-containers", "storage/volumes"];

/// What Podman itself keeps in `/run` for its next command.
const KEPT: [&str; 7] = [
    // What CRIU, which Podman asks for its version, has found out about the kernel.
    "/run/criu.kdat",
    "/run/containers",
    "/run/libpod",
    "/run/lock",
    "d /run/containers",
    "d /run/libpod",
    // The directory of the network namespaces.
    "d /run/netns",
];

/// The files in which Podman's storage lists all containers.
const LISTS: [&str; 3] = [
    "storage/overlay-containers/containers.json",
    "storage/overlay-containers/containers.lock",
    "storage/overlay-containers/volatile-containers.json",
];

/// The control group in which Podman has its containers' groups.
const PARENT: &str = "libpod_parent";

/// A Podman on a host of its own.
#[derive(Debug)]
pub struct Podman {
    host: PrivateHost,
    version: Version,
    runtime: Runtime,
}

impl Podman {
    /// Makes the host, on which containers have this runtime.
    ///
    /// # Errors
    /// `make setup` has not run, machinen has not been built, or the host cannot be made.
    pub fn start(version: Version, runtime: Runtime) -> Result<Self> {
        let host = PrivateHost::start(|root| configure(root, version, runtime))?;
        Ok(Self { host, version, runtime })
    }

    pub fn host(&self) -> &PrivateHost {
        &self.host
    }

    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// A directory of the host in which a test may have files. It is at the same place inside of the host.
    pub fn dir(&self) -> PathBuf {
        self.host.root().join("tmp")
    }

    /// The resources of the containers now.
    ///
    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn inventory(&self) -> Result<Inventory> {
        self.host.inventory(&STORAGE)
    }

    /// Waits until nothing is there that was not there before, apart from images, all of which are removed.
    ///
    /// # Errors
    /// Something is left; it is listed.
    pub fn settle(&self, before: &Inventory) -> Result<()> {
        // A `podman` that conmon has started after a container's end may fail, since the container is removed already,
        // and then leaves its storage mounted. The next one that succeeds unmounts the storage.
        self.host.settle(before, &STORAGE)?;
        self.ok(&["rmi", "--all"])?;
        let mut left = self.host.settle(before, &STORAGE)?;
        let kept = |file: &String| KEPT.iter().any(|kept| file == kept || is_below(file, kept));
        left.files.retain(|file| !self.runtime.keeps(file));
        left.files.retain(|file| !kept(file) && !LISTS.iter().any(|list| file.ends_with(list)));
        left.cgroups.extend(self.cgroups()?);
        nothing_of(&left)
    }

    /// The control groups of all containers that this Podman has had. Those of pods are made by Podman itself, which
    /// forgets them in some hierarchies.
    fn cgroups(&self) -> Result<Vec<PathBuf>> {
        let events = self.host.path("/run/libpod/events/events.log");
        let events = match fs::read_to_string(&events) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("cannot read {}", events.display()))?,
        };
        let mut ids = Vec::new();
        for line in events.lines() {
            let event: serde_json::Value = serde_json::from_str(line).context("not an event of Podman")?;
            ids.extend(event["ID"].as_str().filter(|id| !id.is_empty()).map(str::to_owned));
        }
        let mut groups = inventory::cgroups(PARENT);
        let of_container =
            |group: &Path| ids.iter().any(|id| group.display().to_string().contains(&format!("-{id}")));
        groups.retain(|group| of_container(group));
        Ok(groups)
    }
}

impl PodmanCommands for Podman {
    fn podman(&self, args: &[&str]) -> Result<Invocation> {
        let criu = paths::workspace().join("target/tools/criu/bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([criu].into_iter().chain(std::env::split_paths(&path)))?;
        let podman = self.host.program(self.version.dir()?.join("usr/bin/podman"))?;
        Ok(podman
            .env("PATH", path)
            .env("TMPDIR", self.dir())
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .args(args))
    }

    fn exchange(&self) -> PathBuf {
        self.dir()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let groups = self.cgroups();
        self.host.end();
        // Groups are left only when a test has failed, which is reported already.
        for group in groups.unwrap_or_default().iter().rev() {
            if let Err(error) = fs::remove_dir(group) {
                eprintln!("cannot remove {}: {error}", group.display());
            }
        }
    }
}

fn is_below(file: &str, dir: &str) -> bool {
    let (_, path) = file.split_once(' ').unwrap_or(("", file));
    path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'))
}

impl Version {
    pub(crate) fn dir(self) -> Result<PathBuf> {
        let name = match self {
            Self::V4 => "podman-4",
            Self::V5 => "podman",
        };
        let dir = paths::workspace().join("target/tools").join(name);
        ensure!(dir.exists(), "{} is missing: run `make setup`", dir.display());
        Ok(dir)
    }
}

fn configure(root: &Path, version: Version, runtime: Runtime) -> Result<()> {
    let dir = version.dir()?;
    let (etc, usr) = (root.join("etc"), dir.join("usr"));
    Invocation::new("cp").arg("-a").arg(dir.join("etc/.")).arg(&etc).run()?.ok()?;
    let storage = format!(
        "[storage]\ndriver = \"overlay\"\ngraphroot = {:?}\nrunroot = \"/run/containers/storage\"\n",
        root.join("storage")
    );
    fs::write(etc.join("containers/storage.conf"), storage).context("cannot configure Podman's storage")?;
    let backend = match version {
        Version::V4 => "cni",
        Version::V5 => "netavark",
    };
    let name = runtime.name();
    // The limits that Podman has otherwise are higher than what a host without CAP_SYS_RESOURCE allows.
    // The runtimes in `runtime_supports_json` report their errors as JSON.
    let config = format!(
        "[containers]\n\
         log_driver = \"k8s-file\"\n\
         default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
         init_path = {init:?}\n\
         [network]\n\
         network_backend = \"{backend}\"\n\
         cni_plugin_dirs = [{plugins:?}]\n\
         firewall_driver = \"iptables\"\n\
         [engine]\n\
         cgroup_manager = \"cgroupfs\"\n\
         events_logger = \"file\"\n\
         lock_type = \"file\"\n\
         conmon_path = [{conmon:?}]\n\
         helper_binaries_dir = [{helpers:?}, {programs:?}]\n\
         image_copy_tmp_dir = {tmp:?}\n\
         runtime = \"{name}\"\n\
         runtime_supports_json = [\"{name}\"]\n\
         [engine.runtimes]\n\
         {name} = [{runtime:?}]\n",
        init = usr.join("bin/catatonit"),
        plugins = usr.join("lib/cni"),
        conmon = usr.join("bin/conmon"),
        helpers = usr.join("lib/podman"),
        programs = usr.join("bin"),
        tmp = root.join("tmp"),
        runtime = runtime.program(root, &Setup::new())?,
    );
    fs::write(etc.join("containers/containers.conf"), config).context("cannot configure Podman")?;
    Ok(())
}
