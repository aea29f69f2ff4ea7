//! A runtime with runc's command line on a host of its own, without any client: the test makes the bundles and is what
//! the runtime's caller is.

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};
use serde_json::{Value, json};

use crate::{
    bundle::Bundle,
    inventory::Inventory,
    paths,
    private_host::{PrivateHost, nothing_of},
    process::{DEADLINE, Invocation, Output, Running, Stream},
    runtime::Runtime,
    setup::Setup,
    sys,
};

/// The directory of the runtime's state, below the host's root. It stays, empty, after the last container.
const STATE: &str = "state";

/// A runtime on a host of its own.
#[derive(Debug)]
pub struct Oci {
    host: PrivateHost,
    runtime: Runtime,
    program: PathBuf,
}

/// A container whose process has the harness's monitor as its parent. See `machinen-private-host monitor`.
#[derive(Debug)]
pub struct Monitored {
    /// The monitor, with the streams of the container.
    pub running: Running,
    reports: Stream,
}

impl Oci {
    /// # Errors
    /// The host cannot be made, or machinen has not been built.
    pub fn start(runtime: Runtime) -> Result<Self> {
        Self::start_with(runtime, &Setup::new())
    }

    /// The same with a configuration of machinen's.
    ///
    /// # Errors
    /// The host cannot be made, or machinen has not been built.
    pub fn start_with(runtime: Runtime, setup: &Setup) -> Result<Self> {
        let host = PrivateHost::start(|_| Ok(()))?;
        let program = runtime.program(host.root(), setup)?;
        Ok(Self { host, runtime, program })
    }

    /// Changes machinen's configuration, for the commands that follow.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set_up(&self, setup: &Setup) -> Result<()> {
        self.runtime.program(self.host.root(), setup).map(drop)
    }

    pub fn host(&self) -> &PrivateHost {
        &self.host
    }

    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// A file of the test in a directory that is removed with the host.
    pub fn file(&self, name: &str) -> PathBuf {
        self.host.root().join("tmp").join(name)
    }

    /// Makes a bundle with this name, for a container with the same id, that runs a command. The caller changes its
    /// specification.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn bundle(&self, id: &str, command: &[&str], change: impl FnOnce(&mut Value)) -> Result<Bundle> {
        let bundle = Bundle::busybox_in(self.host.root().join(format!("bundle-{id}")))?;
        self.configure(&bundle, id, command, change)?;
        Ok(bundle)
    }

    /// Writes the specification of an existing bundle again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn configure(
        &self,
        bundle: &Bundle,
        id: &str,
        command: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let configure = |spec: &mut Value| {
            // The group is removed with the host.
            spec["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", self.host.name()));
            change(spec);
        };
        bundle.config(command, configure).map(drop)
    }

    /// A command of the runtime, in `/`.
    ///
    /// # Errors
    /// The programs of this crate have not been built.
    pub fn command(&self, args: &[&str]) -> Result<Invocation> {
        self.command_with(&[], args)
    }

    /// The same with global options.
    ///
    /// # Errors
    /// The programs of this crate have not been built.
    pub fn command_with(&self, global: &[&str], args: &[&str]) -> Result<Invocation> {
        let command = self.host.program(&self.program)?.env("PATH", self.path()?).arg("--root");
        Ok(command.arg(self.host.root().join(STATE)).args(global).args(args))
    }

    /// A shell script in which `"$@"` is a command of the runtime.
    ///
    /// # Errors
    /// The programs of this crate have not been built.
    pub fn scripted(&self, script: &str, args: &[&str]) -> Result<Invocation> {
        let shell = self.host.program("sh")?.env("PATH", self.path()?).args(["-c", script, "sh"]);
        Ok(shell.arg(&self.program).arg("--root").arg(self.host.root().join(STATE)).args(args))
    }

    /// The host's search path, and CRIU's for the runc that runs it.
    fn path(&self) -> Result<std::ffi::OsString> {
        let criu = paths::workspace().join("target/tools/criu/bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        Ok(std::env::join_paths([criu].into_iter().chain(std::env::split_paths(&path)))?)
    }

    /// Runs a command, whatever its status. Its streams must not be inherited by a container that continues to run.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.command(args)?.run()
    }

    /// Runs a command, and returns what it prints.
    ///
    /// # Errors
    /// The command failed; both of its streams are quoted.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.output(args)?.ok().with_context(|| args.join(" "))?.text())
    }

    /// A command must fail with a status and a text in its errors.
    ///
    /// # Errors
    /// It does not.
    pub fn fails(&self, args: &[&str], status: i32, text: &str) -> Result<()> {
        let output = self.output(args)?;
        let as_expected = output.status == status && output.error_text().contains(text);
        ensure!(as_expected, "{args:?} must fail with {status} and {text:?}: {output}");
        Ok(())
    }

    /// `create` for a bundle of [`Oci::bundle`]. The container inherits the streams of what is returned.
    ///
    /// # Errors
    /// The creation failed.
    pub fn create(&self, id: &str) -> Result<Running> {
        self.create_with(id, &[])
    }

    /// The same with options.
    ///
    /// # Errors
    /// The creation failed.
    pub fn create_with(&self, id: &str, options: &[&str]) -> Result<Running> {
        let bundle = self.bundle_dir(id);
        let create = self.command(&["create", "--bundle", &bundle])?.args(options).arg(id);
        let mut running = create.with_stdin().spawn()?;
        let status = running.wait_for_exit()?;
        ensure!(status == 0, "the creation of {id} failed with {status}: {:?}", running.written());
        Ok(running)
    }

    /// Creates and starts.
    ///
    /// # Errors
    /// A step failed.
    pub fn launch(&self, id: &str) -> Result<Running> {
        let running = self.create(id)?;
        self.ok(&["start", id])?;
        Ok(running)
    }

    /// `create` as conmon does it.
    ///
    /// # Errors
    /// The creation failed.
    pub fn create_monitored(&self, id: &str) -> Result<Monitored> {
        let (bundle, pid_file) = (self.bundle_dir(id), self.file(&format!("{id}.pid")).display().to_string());
        self.monitored(id, &pid_file, &["create", "--bundle", &bundle, "--pid-file", &pid_file, id])
    }

    /// Any command that leaves a process behind whose pid it writes to a file.
    ///
    /// # Errors
    /// The command failed.
    pub fn monitored(&self, name: &str, pid_file: &str, args: &[&str]) -> Result<Monitored> {
        let fifo = self.file(&format!("{name}.reports"));
        mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).context("cannot make a FIFO")?;
        let program = self.host.program(paths::own_program("machinen-private-host")?)?;
        let monitor = program.env("PATH", self.path()?).arg("monitor").arg(&fifo).arg(pid_file);
        let command = monitor.arg(&self.program).arg("--root").arg(self.host.root().join(STATE)).args(args);
        // The monitor must be able to open the FIFO, and a reader must not wait for a monitor that has failed.
        let reports = File::options().read(true).write(true).open(&fifo).context("cannot open a FIFO")?;
        let mut running = command.with_stdin().spawn()?;
        let monitored = Monitored { reports: Stream::read(reports), running };
        if !monitored.reports.contains("runtime 0\n", DEADLINE) {
            running = monitored.running;
            bail!("`{}` failed: {:?}", args.join(" "), running.written());
        }
        Ok(monitored)
    }

    /// The bundle of a container, as an argument.
    pub fn bundle_dir(&self, id: &str) -> String {
        self.host.root().join(format!("bundle-{id}")).display().to_string()
    }

    /// The container's state as the runtime prints it.
    ///
    /// # Errors
    /// There is none.
    pub fn state(&self, id: &str) -> Result<Value> {
        let text = self.ok(&["state", id])?;
        serde_json::from_str(&text).with_context(|| format!("not a state: {text}"))
    }

    /// # Errors
    /// The container's status is another one.
    pub fn has_status(&self, id: &str, wanted: &str) -> Result<()> {
        let state = self.state(id)?;
        ensure!(state["status"] == wanted, "not {wanted}: {state}");
        Ok(())
    }

    /// Waits for the end of the container's process, which the runtime has reported.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&self, pid: u32) -> Result<()> {
        ensure!(crate::process::wait_for_end(pid, DEADLINE)?, "the process {pid} does not end");
        Ok(())
    }

    /// The pid in the container's state.
    ///
    /// # Errors
    /// It has none.
    pub fn pid(&self, id: &str) -> Result<u32> {
        let state = self.state(id)?;
        let pid = state["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|pid| *pid > 0).with_context(|| format!("no pid in {state}"))
    }

    /// # Errors
    /// `/proc` or a directory cannot be read.
    pub fn inventory(&self) -> Result<Inventory> {
        self.host.inventory(&[STATE])
    }

    /// Waits until nothing is there that was not there before.
    ///
    /// # Errors
    /// Something is left; it is listed.
    pub fn settle(&self, before: &Inventory) -> Result<()> {
        let mut left = self.host.settle(before, &[STATE])?;
        left.files.retain(|file| !self.runtime.keeps(file) && !file.ends_with("/state/@pods"));
        nothing_of(&left)
    }
}

impl Monitored {
    /// Waits for the end of the container's process, and returns its pid and status.
    ///
    /// # Errors
    /// The process does not end, or the monitor was not its parent.
    pub fn wait(&self) -> Result<(u32, i32)> {
        ensure!(self.reports.contains("container ", DEADLINE), "the container's process does not end");
        // The line is written by one call.
        let text = String::from_utf8_lossy(&self.reports.so_far()).into_owned();
        let words: Vec<_> = text.lines().last().unwrap_or_default().split(' ').collect();
        let ["container", pid, status] = words[..] else { bail!("odd report {text:?}") };
        let status = status.parse().with_context(|| format!("no status: {text:?}"))?;
        Ok((pid.parse()?, status))
    }
}

/// A socket at which a runtime hands over the terminal of a container.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
}

impl ConsoleSocket {
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path);
        Ok(Self { listener: listener.with_context(|| format!("cannot listen at {}", path.display()))? })
    }

    /// Waits for the terminal's master.
    ///
    /// # Errors
    /// It does not come in time, or what comes is not one descriptor.
    pub fn receive(&self) -> Result<OwnedFd> {
        let timeout = PollTimeout::try_from(Duration::from_secs(60)).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.listener), PollFlags::POLLIN)];
        ensure!(poll(&mut fds, timeout)? > 0, "no terminal was handed over");
        let (connection, _) = self.listener.accept()?;
        let (_, fds) = sys::receive_with_fds(&connection, &mut [0; 4096])?;
        let [master]: [OwnedFd; 1] =
            fds.try_into().map_err(|fds: Vec<_>| anyhow::anyhow!("{} descriptors", fds.len()))?;
        Ok(master)
    }
}

/// Reads a JSON file.
///
/// # Errors
/// It cannot be read, or is not JSON.
pub fn json_of(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
}
