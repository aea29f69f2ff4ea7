//! The installer of `deploy/installer` on a node: a directory stands for the node's root, and containerd, whose
//! configuration is changed, is a real one.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use machinen_integration::{
    cri::{Handler, Node},
    inventory,
    paths::{self, Version},
    process::{Invocation, Output},
};

use super::pod_tests;

pod_tests! {
    installer_1_7(V1_7, Installed): [installed_upgraded_and_removed];
    installer_2_1(V2_1, Installed): [installed_upgraded_and_removed];
}

const SHIM: &str = "containerd-shim-machinen-v1";

/// The directories of a node, and a version to install.
struct Host {
    root: PathBuf,
    from: PathBuf,
    config: PathBuf,
    containerd: PathBuf,
    _dir: tempfile::TempDir,
}

impl Host {
    /// With the configuration at `config`.
    fn new(version: Version, config: &Path) -> Result<Self> {
        let dir = tempfile::tempdir_in("/var/tmp")?;
        let (root, from) = (dir.path().join("host"), dir.path().join("from"));
        for dir in
            [root.clone(), from.join("bin"), from.join("lib/machinen"), root.join("cache/rootdisk/layers")]
        {
            fs::create_dir_all(dir)?;
        }
        fs::write(root.join("cache/rootdisk/key.ext4"), "")?;
        for program in [SHIM, "machinen"] {
            fs::copy(paths::release_dir()?.join(program), from.join("bin").join(program))?;
        }
        for file in ["vmlinux", "guest.img"] {
            symlink(paths::assets().join(file), from.join("lib/machinen").join(file))?;
        }
        let containerd = paths::containerd_program(version, "containerd")?;
        Ok(Self { root, from, config: config.to_owned(), containerd, _dir: dir })
    }

    fn prefix(&self) -> PathBuf {
        self.root.join("opt/machinen")
    }

    /// The installer with the shell of its image. The node's root is this machine's, with all that is written elsewhere.
    fn run(&self, verb: &str, force: bool) -> Result<Output> {
        let script = paths::workspace().join("deploy/installer/machinen-installer");
        let mut installer = Invocation::new("/bin/busybox").arg("sh").arg(script).arg(verb);
        if force {
            installer = installer.env("FORCE", "1");
        }
        installer
            .env("HOST", "/")
            .env("FROM", &self.from)
            .env("PREFIX", self.prefix())
            .env("CACHE", self.root.join("cache"))
            .env("CONFIG", &self.config)
            .env("HANDLER", Handler::Installed.name())
            .env("CONTAINERD", &self.containerd)
            .env("RESTART", format!("touch {}", self.restarts().display()))
            .run()
    }

    fn restarts(&self) -> PathBuf {
        self.root.join("restarts")
    }

    /// Whether the installer has asked for a restart since the last question.
    fn wants_restart(&self) -> bool {
        fs::remove_file(self.restarts()).is_ok()
    }
}

fn installed_upgraded_and_removed(node: &mut Node) -> Result<()> {
    let config = node.containerd().root().join("containerd.toml");
    let before = fs::read(&config)?;
    let host = Host::new(node.containerd().version(), &config)?;
    let Err(unknown) = node.pod(|_| ()) else { anyhow::bail!("a pod runs before the installation") };
    ensure!(format!("{unknown:#}").contains(Handler::Installed.name()), "{unknown:#}");

    host.run("install", false)?.ok()?;
    ensure!(host.wants_restart(), "containerd does not learn of the runtime");
    node.restart()?;
    let pod = node.pod(|_| ())?;
    let old = pod.idle("old")?;
    let shim = shims(node, &host)?;
    ensure!(shim.len() == 1, "not one shim: {shim:?}");

    // Again, and another version: pods go on, and containerd is not disturbed.
    host.run("install", false)?.ok()?;
    fs::write(host.from.join("lib/machinen/VERSION"), "2")?;
    host.run("install", false)?.ok()?;
    ensure!(!host.wants_restart(), "containerd is restarted by an upgrade");
    ensure!(host.prefix().join("lib/machinen/VERSION").exists(), "the new version is not there");
    ensure!(old.shell("echo served")? == "served\n", "the pod of the old version does not go on");
    let new = node.pod(|_| ())?;
    ensure!(new.idle("new")?.shell("echo served")? == "served\n", "there are no new pods");
    new.remove()?;

    let refused = host.run("remove", false)?;
    let text = refused.error_text();
    ensure!(
        text.contains("delete the pods of the RuntimeClass first"),
        "removed under a running pod: {text}"
    );
    ensure!(old.shell("echo served")? == "served\n", "a refusal has changed something");
    pod.remove()?;
    node.settle()?;
    host.run("remove", false)?.ok()?;
    ensure!(host.wants_restart(), "containerd still has the runtime");
    ensure!(fs::read(&config)? == before, "the configuration is not what it was");
    let left = inventory::files_below(&host.root)?;
    let opt = format!("d {}", host.root.join("opt").display());
    ensure!(left.iter().all(|file| *file == opt), "left: {left:?}");
    node.restart()?;
    ensure!(node.pod(|_| ()).is_err(), "a pod runs after the removal");
    // Once more is no error.
    host.run("remove", false)?.ok()?;
    ensure!(!host.wants_restart(), "nothing has changed");
    Ok(())
}

/// Processes that run the installed shim.
fn shims(node: &Node, host: &Host) -> Result<Vec<u32>> {
    let all = inventory::descendants(node.containerd().keeper_pid())?;
    let runs = |pid: u32| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == host.prefix().join("bin").join(SHIM))
    };
    let served = all.iter().filter(|process| runs(process.pid) && process.command.contains("-id "));
    Ok(served.map(|process| process.pid).collect())
}
