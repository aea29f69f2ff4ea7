//! A private containerd: own root, state, socket and namespace, gone with everything it started when dropped.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use crate::{
    inventory::{Inventory, Scope},
    paths::{self, Version},
    process::Invocation,
    setup::Setup,
    sys,
};

/// Longest that containerd may take to serve, and that its leftovers may take to go.
const DEADLINE: Duration = Duration::from_secs(30);

/// Plugins that no test needs; without them containerd starts in 40 ms and leaves the host's /opt and /run alone.
const DISABLED_PLUGINS: [&str; 14] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// A running private containerd.
#[derive(Debug)]
pub struct Containerd {
    version: Version,
    root: PathBuf,
    namespace: String,
    keeper: Child,
    commands: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
    pid: u32,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    ids: AtomicU32,
}

/// containerd's log so far; its shims' logs are in it too.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
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
        // Not /tmp, which may be a tmpfs: overlayfs and rootdisks want a real disk. Socket paths must be short.
        let root = tempfile::Builder::new().prefix("mit-").tempdir_in("/var/tmp");
        let root = root.context("cannot make a directory in /var/tmp")?.keep();
        let namespace = root.file_name().and_then(|name| name.to_str()).context("odd directory name")?;
        let namespace = namespace.to_owned();
        write_configuration(&root, setup)?;

        let containerd = paths::containerd_program(version, "containerd")?;
        let mut keeper = Invocation::new(paths::own_program("machinen-keeper")?)
            .args([&root, Path::new(&namespace), &containerd, Path::new("--config")])
            .arg(root.join("containerd.toml"))
            .env("PATH", search_path()?)
            .env("TMPDIR", root.join("tmp"))
            .env("MACHINEN_CONFIG", root.join("machinen.toml"));
        for (name, value) in setup.environment() {
            keeper = keeper.env(name, value);
        }
        let mut keeper = keeper.serve()?;
        let log = Arc::new(Log::default());
        let stderr = keeper.stderr.take().context("the keeper has no stderr")?;
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || BufReader::new(stderr).lines().map_while(Result::ok).for_each(|line| log.push(line))
        });
        let mut containerd = Self {
            version,
            root,
            namespace,
            commands: keeper.stdin.take(),
            replies: BufReader::new(keeper.stdout.take().context("the keeper has no stdout")?),
            keeper,
            pid: 0,
            log,
            reader: Some(reader),
            ids: AtomicU32::new(1),
        };
        containerd.wait_until_serving(0)?;
        Ok(containerd)
    }

    /// Kills containerd and starts it again; shims live on.
    ///
    /// # Errors
    /// As for [`Containerd::start_with`].
    pub fn restart(&mut self) -> Result<()> {
        let from = self.log.len();
        let keeper = self.commands.as_mut().context("the keeper is gone")?;
        writeln!(keeper, "restart").context("cannot write to the keeper")?;
        self.wait_until_serving(from)
    }

    fn wait_until_serving(&mut self, from: usize) -> Result<()> {
        let mut pid = String::new();
        self.replies.read_line(&mut pid).context("cannot read from the keeper")?;
        self.pid =
            pid.trim().parse().with_context(|| format!("containerd was not started: {}", self.log()))?;
        self.wait_for_log(from, DEADLINE, |line| line.contains("containerd successfully booted"))?;
        Ok(())
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// Directory of this containerd; removed in the end.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn socket(&self) -> PathBuf {
        self.root.join("c.sock")
    }

    /// Pid of containerd itself.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where a container's bundle is while its task exists.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.root.join("s/io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    /// A container id that was not used before with this containerd.
    pub fn new_id(&self) -> String {
        format!("c{}", self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// The log so far, without the lines that every start of containerd writes.
    pub fn log(&self) -> String {
        let lines = self.log.lines.lock().expect("the log's reader does not panic");
        let telling = lines.iter().filter(|line| !line.contains("loading plugin"));
        telling.map(|line| format!("{line}\n")).collect()
    }

    /// Number of log lines so far, for [`Containerd::wait_for_log`].
    pub fn log_position(&self) -> usize {
        self.log.len()
    }

    /// Waits for a log line after the given position, and returns it.
    ///
    /// # Errors
    /// It did not come in time, or containerd ended before.
    pub fn wait_for_log(
        &self,
        from: usize,
        time: Duration,
        mut wanted: impl FnMut(&str) -> bool,
    ) -> Result<String> {
        let end = Instant::now() + time;
        let mut lines = self.log.lines.lock().expect("the log's reader does not panic");
        let mut next = from;
        loop {
            if let Some(line) = lines[next..].iter().find(|line| wanted(line)) {
                return Ok(line.clone());
            }
            next = lines.len();
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.reader.as_ref().is_none_or(JoinHandle::is_finished) {
                drop(lines);
                bail!("containerd did not log what was awaited:\n{}", self.log());
            }
            lines = self.log.grown.wait_timeout(lines, left).expect("the log's reader does not panic").0;
        }
    }

    /// Waits until containerd has passed on a shim's event, e.g. `/tasks/exit`.
    ///
    /// # Errors
    /// As for [`Containerd::wait_for_log`].
    pub fn wait_for_event(&self, from: usize, topic: &str) -> Result<String> {
        let topic = format!("topic={topic} ");
        self.wait_for_log(from, DEADLINE, |line| line.contains("event forwarded") && line.contains(&topic))
    }

    /// Topics of the shims' events after the given log position, in order.
    pub fn events(&self, from: usize) -> Vec<String> {
        let lines = self.log.lines.lock().expect("the log's reader does not panic");
        let forwarded = lines[from..].iter().filter(|line| line.contains("event forwarded"));
        let topics = forwarded.filter_map(|line| line.split_once("topic=")?.1.split(' ').next());
        topics.map(str::to_owned).collect()
    }

    /// What this containerd accounts for now, itself excluded.
    ///
    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn inventory(&self) -> Result<Inventory> {
        let mut inventory = Inventory::take(&self.scope())?;
        inventory.processes.retain(|process| process.pid != self.pid);
        Ok(inventory)
    }

    fn scope(&self) -> Scope {
        let dirs = ["s/io.containerd.runtime.v2.task", "fifo", "tmp"];
        Scope {
            keeper: self.keeper.id(),
            root: self.root.clone(),
            dirs: dirs.iter().map(|dir| self.root.join(dir)).collect(),
            namespace: self.namespace.clone(),
        }
    }

    /// Waits until nothing is left that was not there `before`.
    ///
    /// Woken by the end of each process, a change of the mount table and removals in the bundles' directory.
    ///
    /// # Errors
    /// Something was left after the deadline; it is listed.
    pub fn settle(&self, before: &Inventory) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        let mounts = fs::File::open("/proc/self/mountinfo").context("cannot open the mount table")?;
        let bundles = Inotify::init(InitFlags::IN_CLOEXEC).context("cannot use inotify")?;
        let removals = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM;
        for dir in self.scope().dirs.into_iter().chain([self.bundle("")]) {
            match bundles.add_watch(&dir, removals) {
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot watch {}", dir.display())),
            }
        }
        loop {
            let left = self.inventory()?.since(before);
            let time = end.saturating_duration_since(Instant::now());
            // The namespace's own directory stays with containerd, empty.
            let left = Inventory {
                files: left.files.into_iter().filter(|file| !self.is_frame(file)).collect(),
                ..left
            };
            if left.is_empty() {
                return Ok(());
            }
            if time.is_zero() {
                bail!("left behind after {DEADLINE:?}:\n{left}");
            }
            let ends: Vec<_> = left.processes.iter().filter_map(|it| sys::pidfd_open(it.pid).ok()).collect();
            let mut fds: Vec<_> = ends.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
            fds.push(PollFd::new(mounts.as_fd(), PollFlags::POLLPRI));
            fds.push(PollFd::new(bundles.as_fd(), PollFlags::POLLIN));
            let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
            poll(&mut fds, timeout).context("cannot wait for things to go")?;
            if fds.last().and_then(PollFd::any).unwrap_or(false) {
                bundles.read_events().context("cannot read inotify events")?;
            }
        }
    }

    fn is_frame(&self, file: &str) -> bool {
        let namespace = self.bundle("");
        file.strip_prefix("d ").is_some_and(|dir| Path::new(dir) == namespace)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The end of its stdin is the keeper's order to clean up; the end of its stderr says that all are gone.
        drop(self.commands.take());
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reading a log does not panic");
        }
        let cleaned = self.keeper.wait().is_ok_and(|status| status.success());
        if !cleaned {
            eprintln!("the keeper of {} could not clean up:\n{}", self.root.display(), self.log());
        }
    }
}

impl Log {
    fn push(&self, line: String) {
        self.lines.lock().expect("the log's readers do not panic").push(line);
        self.grown.notify_all();
    }

    fn len(&self) -> usize {
        self.lines.lock().expect("the log's reader does not panic").len()
    }
}

fn write_configuration(root: &Path, setup: &Setup) -> Result<()> {
    for dir in ["tmp", "fifo"] {
        fs::create_dir(root.join(dir)).with_context(|| format!("cannot make {}/{dir}", root.display()))?;
    }
    let dir = root.display();
    let config = format!(
        "version = 2\nroot = \"{dir}/r\"\nstate = \"{dir}/s\"\ndisabled_plugins = {DISABLED_PLUGINS:?}\n\
         [grpc]\naddress = \"{dir}/c.sock\"\n[debug]\nlevel = \"trace\"\n"
    );
    for (name, content) in [("containerd.toml", config), ("machinen.toml", setup.machinen_toml()?)] {
        fs::write(root.join(name), content).with_context(|| format!("cannot write {dir}/{name}"))?;
    }
    Ok(())
}

/// The harness's own path behind the directory of the freshly built shim, if there is one.
fn search_path() -> Result<std::ffi::OsString> {
    let shim = match paths::release_dir() {
        Err(error) if paths::runtime() == "io.machinen.v1" => return Err(error),
        found => found.ok(),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = shim.into_iter().chain(std::env::split_paths(&path));
    std::env::join_paths(dirs).context("a directory of PATH has a colon in its name")
}
