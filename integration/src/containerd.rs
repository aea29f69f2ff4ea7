//! A private containerd with its own root, state, socket and namespace, removed with everything it has
//! started when dropped.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use anyhow::{Context, Result, ensure};

use crate::{
    cri,
    log::Log,
    paths::{self, Version},
    process::{DEADLINE, Invocation, wait_for_end},
    setup::Setup,
};

/// Plugins that no test needs; without them containerd starts in 40 ms and leaves the host's /opt and /run
/// alone.
const DISABLED_PLUGINS: [&str; 9] = [
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// Kubernetes' interface, enabled only on request of a test.
const CRI_PLUGINS: [&str; 4] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
];

/// Enabled only on request of a test, since it needs a disk to copy.
const BLOCKFILE: &str = "io.containerd.snapshotter.v1.blockfile";

/// Bytes of each snapshot of the blockfile snapshotter.
const BLOCKFILE_SIZE: u64 = 64 << 20;

/// A running private containerd.
#[derive(Debug)]
pub struct Containerd {
    version: Version,
    root: PathBuf,
    /// The name of no other containerd: that of the directory of its control groups.
    name: String,
    namespace: String,
    keeper: Child,
    /// None after the keeper was asked to clean up.
    pipes: Mutex<Option<Pipes>>,
    pid: u32,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    ids: Mutex<Vec<String>>,
}

/// Commands to the keeper and its answers.
#[derive(Debug)]
struct Pipes {
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Containerd {
    /// # Errors
    /// See [`Containerd::start_with`].
    pub fn start(version: Version) -> Result<Self> {
        Self::start_with(version, &Setup::new())
    }

    /// Starts containerd and waits until it serves.
    ///
    /// # Errors
    /// A program is missing, or containerd does not start; its log is quoted.
    pub fn start_with(version: Version, setup: &Setup) -> Result<Self> {
        // Not in /tmp, which may be a tmpfs: overlayfs and rootdisks need a real disk. Socket paths must be
        // short.
        let root = tempfile::Builder::new().prefix("mit-").tempdir_in("/var/tmp");
        let root_dir = root.context("cannot make a directory in /var/tmp")?;
        let root = root_dir.path().to_owned();
        let name = root.file_name().and_then(|name| name.to_str()).context("odd directory name")?;
        let name = name.to_owned();
        write_configuration(&root, &name, setup)?;

        let containerd = paths::containerd_program(version, "containerd")?;
        let program = paths::own_program("machinen-keeper")?;
        let keeper = if setup.cri { cri::in_own_network(&program) } else { Invocation::new(program) };
        let mut keeper = keeper
            .args([&root, Path::new(&name), &containerd, Path::new("--config")])
            .arg(root.join("containerd.toml"))
            .env("PATH", search_path(setup)?)
            .env("TMPDIR", root.join("tmp"))
            .env("MACHINEN_CONFIG", root.join("machinen.toml"));
        for (name, value) in setup.environment() {
            keeper = keeper.env(name, value);
        }
        let mut keeper = keeper.serve()?;
        // From here on the keeper removes the directory.
        let root = root_dir.keep();
        let log = Arc::new(Log::default());
        let stderr = keeper.stderr.take().context("the keeper has no stderr")?;
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || log.fill(BufReader::new(stderr))
        });
        let mut containerd = Self {
            version,
            root,
            namespace: if setup.cri { cri::NAMESPACE.to_owned() } else { name.clone() },
            name,
            pipes: Mutex::new(Some(Pipes {
                commands: keeper.stdin.take().context("the keeper has no stdin")?,
                answers: BufReader::new(keeper.stdout.take().context("the keeper has no stdout")?),
            })),
            keeper,
            pid: 0,
            log,
            reader: Some(reader),
            ids: Mutex::default(),
        };
        containerd.wait_until_serving(0)?;
        Ok(containerd)
    }

    /// Writes another configuration of machinen for the shims that start from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn configure(&self, setup: &Setup) -> Result<()> {
        write(&self.root, "machinen.toml", &setup.machinen_toml())
    }

    /// Writes a further configuration of machinen, which the options of a runtime can name; returns its path.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn configuration(&self, name: &str, setup: &Setup) -> Result<PathBuf> {
        write(&self.root, name, &setup.machinen_toml())?;
        Ok(self.root.join(name))
    }

    /// The command line `machinen`, with the configuration that the shims have.
    ///
    /// # Errors
    /// The program has not been built.
    pub fn machinen(&self, args: &[&str]) -> Result<Invocation> {
        let program = paths::release_dir()?.join("machinen");
        Ok(Invocation::new(program).args(args).env("MACHINEN_CONFIG", self.root.join("machinen.toml")))
    }

    /// Kills containerd and starts it again; the shims continue to run.
    ///
    /// # Errors
    /// As for [`Containerd::start_with`].
    pub fn restart(&mut self) -> Result<()> {
        let from = self.log.position();
        self.command("restart")?;
        self.wait_until_serving(from)
    }

    /// Kills containerd; the shims continue to run. [`Containerd::restart`] starts it again.
    ///
    /// # Errors
    /// The keeper has ended.
    pub fn stop(&mut self) -> Result<()> {
        self.command("stop")?;
        self.pid = self.answer()?;
        Ok(())
    }

    /// Runs a shell script as a descendant of the keeper, so that everything that it leaves belongs to this
    /// containerd.
    ///
    /// # Errors
    /// The script cannot be written, or the keeper has ended.
    pub fn run_script(&self, text: &str) -> Result<()> {
        let script = self.root.join("script.sh");
        fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
        self.command(&format!("run {}", script.display()))?;
        let pid = self.answer()?;
        ensure!(wait_for_end(pid, DEADLINE)?, "a script did not end within {DEADLINE:?}");
        Ok(())
    }

    fn command(&self, line: &str) -> Result<()> {
        let mut pipes = self.pipes.lock().expect("the lock is not poisoned");
        let pipes = pipes.as_mut().context("the keeper is gone")?;
        writeln!(pipes.commands, "{line}").context("cannot write to the keeper")
    }

    /// Pid of the process that the keeper has started last.
    fn answer(&self) -> Result<u32> {
        let mut pipes = self.pipes.lock().expect("the lock is not poisoned");
        let mut pid = String::new();
        let pipes = pipes.as_mut().context("the keeper is gone")?;
        pipes.answers.read_line(&mut pid).context("cannot read from the keeper")?;
        pid.trim().parse().with_context(|| format!("the keeper could not start a program: {}", self.log))
    }

    fn wait_until_serving(&mut self, from: usize) -> Result<()> {
        self.pid = self.answer()?;
        self.log.wait_for(from, |line| line.contains("containerd successfully booted"))?;
        Ok(())
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// Directory of this containerd, which is removed at the end.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name of the directory of its control groups.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn socket(&self) -> PathBuf {
        self.root.join("c.sock")
    }

    /// Pid of containerd itself.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The directory of a container's bundle while its task exists.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.root.join("s/io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    /// A container id that this containerd has not used before.
    pub fn new_id(&self) -> String {
        let mut ids = self.ids.lock().expect("the lock is not poisoned");
        let id = format!("c{}", ids.len() + 1);
        ids.push(id.clone());
        id
    }

    /// Adds a container id that the caller has chosen to the inventory.
    pub fn note_id(&self, id: &str) {
        self.ids.lock().expect("the lock is not poisoned").push(id.to_owned());
    }

    /// What containerd and its shims have logged.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Pid of the keeper, the ancestor of all others.
    pub fn keeper_pid(&self) -> u32 {
        self.keeper.id()
    }

    /// Ids of all containers so far.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.ids.lock().expect("the lock is not poisoned").clone()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The end of its stdin is the keeper's order to clean up; the end of its stderr reports that all
        // processes have ended.
        drop(self.pipes.lock().expect("the lock is not poisoned").take());
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reading a log does not panic");
        }
        let cleaned = self.keeper.wait().is_ok_and(|status| status.success());
        if !cleaned {
            eprintln!("the keeper of {} could not clean up:\n{}", self.root.display(), self.log);
        }
    }
}

fn write_configuration(root: &Path, name: &str, setup: &Setup) -> Result<()> {
    for dir in ["tmp", "fifo"] {
        fs::create_dir(root.join(dir)).with_context(|| format!("cannot make {}/{dir}", root.display()))?;
    }
    let dir = root.display();
    let mut disabled = DISABLED_PLUGINS.to_vec();
    let mut more = String::new();
    if let Some(kind) = setup.blockfile {
        let scratch = root.join("scratch.ext4");
        fs::File::create(&scratch)?.set_len(BLOCKFILE_SIZE)?;
        Invocation::new("mke2fs").args(["-q", "-t", kind, "-F"]).arg(&scratch).run()?.ok()?;
        more = format!(
            "[plugins.\"{BLOCKFILE}\"]\nroot_path = \"{dir}/r/{BLOCKFILE}\"\nscratch_file = {scratch:?}\n\
             fs_type = {kind:?}\n"
        );
    } else {
        disabled.push(BLOCKFILE);
    }
    if setup.cri {
        more.push_str(&cri::configure(root, name, setup.snapshotter)?);
    } else {
        disabled.extend(CRI_PLUGINS);
    }
    let config = format!(
        "version = 2\nroot = \"{dir}/r\"\nstate = \"{dir}/s\"\ndisabled_plugins = {disabled:?}\n\
         [grpc]\naddress = \"{dir}/c.sock\"\n[debug]\nlevel = \"trace\"\n{more}"
    );
    write(root, "containerd.toml", &config)?;
    write(root, "machinen.toml", &setup.machinen_toml())
}

fn write(dir: &Path, name: &str, content: &str) -> Result<()> {
    fs::write(dir.join(name), content).with_context(|| format!("cannot write {}/{name}", dir.display()))
}

/// The search path: the setup's directories, the directory of the freshly built shim, if there is one, and
/// the harness's own path.
fn search_path(setup: &Setup) -> Result<std::ffi::OsString> {
    let shim = match paths::release_dir() {
        Err(error) if paths::runtime() == "io.machinen.v1" => return Err(error),
        found => found.ok(),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = setup.programs.iter().cloned().chain(shim).chain(std::env::split_paths(&path));
    std::env::join_paths(dirs).context("a directory of PATH has a colon in its name")
}
