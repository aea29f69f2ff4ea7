//! The installer of `deploy/installer` on a node: a directory stands for the node's root, and containerd, whose
//! configuration is changed, is a real one.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use machinen_integration::{
    cri::{Handler, Node, OTHER_CONFIGURATION, Pod},
    inventory,
    paths::{self, Version},
    process::{Invocation, Output},
    setup::{Setup, Value},
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
        let base = dir.path();
        let (root, from) = (base.join("host"), base.join("from"));
        for dir in ["host/cache/rootdisk/layers", "from/bin", "from/lib/machinen", "from/handlers"] {
            fs::create_dir_all(base.join(dir))?;
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

    /// The configuration of the handler `Installed-NAME`.
    fn handler(&self, name: &str) -> PathBuf {
        self.from.join("handlers").join(format!("{name}.toml"))
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

    let small = |mib| Setup::new().set("vm", "memory_mib", Value::number(mib));
    fs::copy(node.containerd().configuration(OTHER_CONFIGURATION, &small(300))?, host.handler("other"))?;
    host.run("install", false)?.ok()?;
    ensure!(host.wants_restart(), "containerd does not learn of the runtime");
    node.restart()?;
    let other = node.pod_of(Handler::InstalledOther, |_| ())?;
    ensure!((200..300).contains(&memory_mib(&other)?), "the second handler has another configuration");
    other.remove()?;
    let pod = node.pod(|_| ())?;
    let old = pod.idle("old")?;
    let shim = shims(node, &host)?;
    ensure!(shim.len() == 1, "not one shim: {shim:?}");

    // Again, and another version: pods go on, and containerd is not disturbed.
    host.run("install", false)?.ok()?;
    fs::write(host.from.join("lib/machinen/VERSION"), "2")?;
    fs::copy(node.containerd().configuration(OTHER_CONFIGURATION, &small(400))?, host.handler("other"))?;
    host.run("install", false)?.ok()?;
    ensure!(!host.wants_restart(), "containerd is restarted by an upgrade");
    ensure!(host.prefix().join("lib/machinen/VERSION").exists(), "the new version is not there");
    ensure!(old.shell("echo served")? == "served\n", "the pod of the old version does not go on");
    let new = node.pod(|_| ())?;
    ensure!(new.idle("new")?.shell("echo served")? == "served\n", "there are no new pods");
    new.remove()?;
    let other = node.pod_of(Handler::InstalledOther, |_| ())?;
    ensure!((300..400).contains(&memory_mib(&other)?), "its configuration is not that of the new version");
    other.remove()?;
    // A handler that the new version does not have.
    fs::remove_file(host.handler("other"))?;
    host.run("install", false)?.ok()?;
    ensure!(host.wants_restart() && !host.prefix().join("handlers/other.toml").exists(), "it is still there");
    node.restart()?;
    ensure!(node.pod_of(Handler::InstalledOther, |_| ()).is_err(), "containerd still has it");

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

/// The memory of the VM of a pod.
fn memory_mib(pod: &Pod) -> Result<u64> {
    let kib = pod.idle("main")?.shell("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    Ok(kib.trim().parse::<u64>()? >> 10)
}

/// An administrator has added the first handler: the installer adds the second one only, and takes it away again. A
/// name that no handler can have is refused.
#[test]
fn a_handler_that_is_there_already() -> Result<()> {
    for version in [Version::V1_7, Version::V2_1] {
        let dir = tempfile::tempdir_in("/var/tmp")?;
        let config = dir.path().join("config.toml");
        let name = Handler::Installed.name();
        let section = format!("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]");
        let by_hand = format!("version = 2\n{section}\nruntime_type = \"io.machinen.v1\"\n");
        fs::write(&config, &by_hand)?;
        let host = Host::new(version, &config)?;
        host.run("install", false)?.ok()?;
        ensure!(
            fs::read_to_string(&config)? == by_hand && !host.wants_restart(),
            "it has not stayed as it was"
        );
        fs::write(host.handler("other"), "[pool]\nsize = 0\n")?;
        for is_new in [true, false] {
            host.run("install", false)?.ok()?;
            ensure!(host.wants_restart() == is_new, "containerd is restarted without a reason, or is not");
        }
        let added = fs::read_to_string(&config)?;
        let file = host.prefix().join("handlers/other.toml");
        ensure!(added.matches(&section).count() == 1, "the first handler was added twice: {added}");
        ensure!(added.contains(&format!("ConfigPath = {file:?}")) && file.exists(), "{added}");
        fs::write(host.handler("a.b"), "")?;
        let refused = host.run("install", false)?;
        ensure!(refused.status != 0 && refused.error_text().contains("a.b.toml"), "{refused}");
        for name in ["a.b", "other"] {
            fs::remove_file(host.handler(name))?;
        }
        host.run("install", false)?.ok()?;
        ensure!(fs::read_to_string(&config)? == by_hand && host.wants_restart(), "the second one is left");
        host.run("remove", false)?.ok()?;
        ensure!(fs::read_to_string(&config)? == by_hand, "the configuration is not what it was");
        ensure!(fs::read_dir(dir.path())?.count() == 1, "files are left next to it");
    }
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
