//! A host of a test's own, for programs that keep their state at fixed places of the host: namespaces for mounts and
//! the network, with an empty `/run`, and with an `/etc` and a `/var/lib` that can be written.
//!
//! ```text
//!   test ──stdin pipe──> machinen-keeper (subreaper)
//!     │                      └── machinen-private-host serve ── programs, and what they leave
//!     └── machinen-private-host run ──socket──┘
//! ```

use std::{
    collections::BTreeSet,
    fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    inventory::{Inventory, Process, cgroups, descendants, files_below, mount_points},
    log::Log,
    paths,
    process::{Invocation, wait_for_end},
};

/// The line with which the server reports that it listens.
pub const READY: &str = "the private host is ready";

/// Longest that leftovers may take to disappear.
const DEADLINE: Duration = Duration::from_secs(30);

/// The places where machinen writes what it has found out about the machine. Finding it out takes seconds.
const FINDINGS: &str = "/run/machinen";

/// A running host. Everything in it ends and is removed when this is dropped.
#[derive(Debug)]
pub struct PrivateHost {
    root: PathBuf,
    keeper: Child,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    /// The first process in the namespaces.
    server: u32,
}

impl PrivateHost {
    /// Starts the host. Files below `root/etc` and `root/var-lib`, which `prepare` may write, appear in its `/etc` and
    /// `/var/lib`.
    ///
    /// # Errors
    /// There is no directory for it, or the namespaces cannot be made.
    pub fn start(prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        // Not in /tmp, which may be a tmpfs: overlayfs needs a real disk. Paths of sockets must be short.
        let root = tempfile::Builder::new().prefix("mph-").tempdir_in("/var/tmp");
        let root_dir = root.context("cannot make a directory in /var/tmp")?;
        let root = root_dir.path().to_owned();
        for dir in ["etc", "var-lib", "work-etc", "work-var-lib", "tmp", "findings"] {
            fs::create_dir(root.join(dir))
                .with_context(|| format!("cannot make {}/{dir}", root.display()))?;
        }
        keep_findings(&root.join("findings"))?;
        // The host's file may be a link into /run, or name servers that are out of reach.
        fs::write(root.join("etc/resolv.conf"), "nameserver 10.255.255.53\n")?;
        prepare(&root)?;
        let script = root.join("start.sh");
        fs::write(&script, start_script(&root)?)
            .with_context(|| format!("cannot write {}", script.display()))?;
        let keeper = Invocation::new(paths::own_program("machinen-keeper")?)
            .args([&root, Path::new(name_of(&root)?), Path::new("unshare"), Path::new("--net")])
            .args(["--mount", "--", "sh", "-e"])
            .arg(&script);
        let mut keeper = keeper.serve()?;
        // From here on the keeper removes the directory.
        let root = root_dir.keep();
        let log = Arc::new(Log::default());
        let stderr = keeper.stderr.take().context("the keeper has no stderr")?;
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || log.fill(BufReader::new(stderr))
        });
        let mut host = Self { root, keeper, log, reader: Some(reader), server: 0 };
        host.log.wait_for(0, |line| line == READY).map_err(|error| host.with_log(&error))?;
        let first = descendants(host.keeper.id())?;
        host.server = first.first().context("the keeper has no child")?.pid;
        Ok(host)
    }

    /// The first process in the host's namespaces.
    pub fn server(&self) -> u32 {
        self.server
    }

    /// The directory of the host, which is removed at the end. It is at the same place inside of the host.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The name of the host, which is also that of a control group that is removed at the end.
    pub fn name(&self) -> &str {
        name_of(&self.root).expect("the name was used for the keeper")
    }

    /// A program to run inside of the host, in `/`. Signals for it must be sent to its own pid.
    ///
    /// # Errors
    /// The programs of this crate have not been built.
    pub fn program(&self, program: impl AsRef<Path>) -> Result<Invocation> {
        let run = Invocation::new(paths::own_program("machinen-private-host")?).arg("run");
        Ok(run.arg(socket(&self.root)).arg(program.as_ref()))
    }

    /// A path of the host, for the test's own file operations.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.server))
    }

    /// The processes that programs have left.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let mut processes = descendants(self.keeper.id())?;
        processes.retain(|process| process.pid != self.server);
        Ok(processes)
    }

    /// The resources of the host now: processes, mounts, devices of VMs and containers, control groups of
    /// [`PrivateHost::name`], and files in `/run` and in the given directories of the host's root.
    ///
    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn inventory(&self, dirs: &[&str]) -> Result<Inventory> {
        let run = self.path("/run");
        let mut files = files_below(&run)?;
        for dir in dirs {
            files.extend(files_below(&self.root.join(dir))?);
        }
        let prefix = self.path("").display().to_string();
        let inside = |file: String| file.replacen(&prefix, "", 1);
        let devices = fs::read_to_string(format!("/proc/{}/net/dev", self.server))?;
        let devices = devices.lines().filter_map(|line| line.trim().split_once(':'));
        let devices = devices.filter(|(name, _)| name.starts_with("veth") || name.starts_with("machinen"));
        Ok(Inventory {
            processes: self.processes()?.into_iter().collect(),
            mounts: mount_points(&format!("/proc/{}/mountinfo", self.server))?.into_iter().collect(),
            files: files
                .into_iter()
                .map(inside)
                .chain(devices.map(|(name, _)| format!("(network device) {name}")))
                .collect(),
            cgroups: cgroups(self.name()).into_iter().filter(|path| !path.ends_with(self.name())).collect(),
        })
    }

    /// Waits until all processes that were not there before have ended, and returns what else is left then.
    ///
    /// # Errors
    /// Processes are left after the deadline; they are listed.
    pub fn settle(&self, before: &Inventory, dirs: &[&str]) -> Result<Inventory> {
        let end = Instant::now() + DEADLINE;
        loop {
            let left = self.inventory(dirs)?.since(before);
            let Some(process) = left.processes.first() else { return Ok(left) };
            if !wait_for_end(process.pid, end.saturating_duration_since(Instant::now()))? {
                bail!("left behind after {DEADLINE:?}:\n{left}");
            }
        }
    }

    fn with_log(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow::anyhow!("{error:#}: {}", self.log)
    }
}

impl PrivateHost {
    /// Ends all processes and removes everything, the first time.
    pub(crate) fn end(&mut self) {
        // The end of its stdin is the keeper's order to clean up; the end of its stderr reports that all processes have
        // ended.
        drop(self.keeper.stdin.take());
        let Some(reader) = self.reader.take() else { return };
        reader.join().expect("reading a log does not panic");
        let cleaned = self.keeper.wait().is_ok_and(|status| status.success());
        if !cleaned {
            eprintln!("the keeper of {} could not clean up:\n{}", self.root.display(), self.log);
        }
    }
}

impl Drop for PrivateHost {
    fn drop(&mut self) {
        self.end();
    }
}

/// Nothing of an inventory may be there.
///
/// # Errors
/// Something is there; it is listed.
pub fn nothing_of(left: &Inventory) -> Result<()> {
    ensure!(left.is_empty(), "left behind:\n{left}");
    Ok(())
}

fn socket(root: &Path) -> PathBuf {
    root.join("a.sock")
}

fn name_of(root: &Path) -> Result<&str> {
    root.file_name().and_then(|name| name.to_str()).context("odd directory name")
}

fn keep_findings(dir: &Path) -> Result<()> {
    let files: BTreeSet<PathBuf> = match fs::read_dir(FINDINGS) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeSet::new(),
        entries => entries?.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect(),
    };
    for file in files {
        let name = file.file_name().context("a file without a name")?;
        fs::copy(&file, dir.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    Ok(())
}

fn start_script(root: &Path) -> Result<String> {
    let (dir, program, socket) = (root.display(), paths::own_program("machinen-private-host")?, socket(root));
    let overlay = |name: &str, at: &str| {
        format!(
            "mount -t overlay -o lowerdir={at},upperdir={dir}/{name},workdir={dir}/work-{name} overlay {at}\n"
        )
    };
    Ok(format!(
        "ip link set lo up\n{}{}\
         mount -t tmpfs -o mode=755 tmpfs /run\n\
         mkdir -m 755 /run/lock {FINDINGS}\n\
         cp -a {dir}/findings/. {FINDINGS}\n\
         exec {} serve {}\n",
        overlay("etc", "/etc"),
        overlay("var-lib", "/var/lib"),
        program.display(),
        socket.display()
    ))
}
