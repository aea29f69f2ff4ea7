//! The host process that stands for a process of a container: the pid that the caller of the command line gets.
//!
//! It holds the standard streams until the monitor has duplicated them, ends with the exit status of the process, and
//! passes on the signals that it gets. It is orphaned when the verb that started it ends, so that a caller that is a
//! subreaper (conmon, containerd's shim for runc) can wait for it. In the end it is a process in the container's
//! namespaces and cgroup on the host, with the view of the container's files as its root, as the container's anchor is.
//!
//! ```text
//!   verb        starts the stand-in, with the streams       names fd://PID/0 and so on in the request
//!   monitor     duplicates the streams
//!   verb        "go ANCHOR"                                 or ends, and then the stand-in ends too
//!   stand-in    closes the streams, enters the namespaces, waits for the process
//! ```

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::ExitCode,
};

use machinen::{
    cgroup,
    error::chain,
    fs::FileError,
    pod::ContainerId,
    process::{Jail, Stdio},
    reexec::EntryPoint,
    sys::{self, socket::send_with_fd},
};
use nix::sched::{CloneFlags, setns};
use rustix::{
    process::{Pid, PidfdFlags, ioctl_tiocsctty, pidfd_open},
    termios::tcgetwinsize,
};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{client::MonitorClient, error::OciError, pod::PodDir, state::HostProcess};

/// The process that stands for a process of a container.
pub(crate) const ENTRY_POINT: EntryPoint = EntryPoint { name: "container-process", main };

/// The descriptor of the verb's orders.
const ORDERS_FD: i32 = 3;
/// The exit status if the monitor is lost, as after SIGKILL.
const LOST: u8 = 137;

/// What the stand-in must know from its start.
#[derive(Debug, Serialize, Deserialize)]
struct StandInParams {
    pod: PodDir,
    id: String,
    /// The id of a process that was added; empty for the init.
    exec: String,
    terminal: bool,
}

/// A stand-in that was started. If this is dropped before [`StandIn::go`], the process ends.
#[derive(Debug)]
pub(crate) struct StandIn {
    pub(crate) process: HostProcess,
    /// It stands for the container's init, and not for a process that is added.
    is_init: bool,
    orders: File,
}

/// Where a stand-in's standard streams come from.
#[derive(Debug)]
pub(crate) enum StandInStreams {
    /// Those of the verb.
    Inherited,
    /// The side of a pseudo-terminal that programs use.
    Terminal(OwnedFd),
    /// Pipes, for stdin, stdout and stderr; without the first, stdin is /dev/null.
    Pipes(Option<OwnedFd>, OwnedFd, OwnedFd),
}

impl StandIn {
    /// Starts the stand-in of the container's init, or of the process that is added as `exec`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub(crate) fn start(
        id: &ContainerId,
        pod: &PodDir,
        exec: &str,
        streams: StandInStreams,
    ) -> Result<Self, OciError> {
        let failed = |source| OciError::Spawn { purpose: "stands for the container", source };
        let (reader, orders) = io::pipe().map_err(OciError::io("make a pipe"))?;
        let params = StandInParams {
            pod: pod.clone(),
            id: id.to_string(),
            exec: exec.to_owned(),
            terminal: matches!(streams, StandInStreams::Terminal(_)),
        };
        let params = serde_json::to_string(&params).map_err(OciError::Encode)?;
        let jail = Jail {
            empty_environment: true,
            new_keyring: true,
            no_new_privileges: true,
            no_core: true,
            ..Jail::default()
        };
        let spawn = ENTRY_POINT.spawn().jail(jail).args([params]).fd(reader.into(), ORDERS_FD);
        let spawn = match streams {
            StandInStreams::Inherited => {
                spawn.stdin(Stdio::Inherit).stdout(Stdio::Inherit).stderr(Stdio::Inherit)
            }
            StandInStreams::Pipes(stdin, stdout, stderr) => {
                let stdin = stdin.map_or(Stdio::Null, Stdio::Fd);
                spawn.stdin(stdin).stdout(Stdio::Fd(stdout)).stderr(Stdio::Fd(stderr))
            }
            StandInStreams::Terminal(slave) => {
                let again =
                    || slave.try_clone().map(Stdio::Fd).map_err(OciError::io("duplicate the terminal"));
                spawn.stdin(again()?).stdout(again()?).stderr(Stdio::Fd(slave))
            }
        };
        let process = HostProcess::of(spawn.detach().map_err(failed)?)?;
        Ok(Self { process, is_init: exec.is_empty(), orders: OwnedFd::from(orders).into() })
    }

    /// The name of one of its standard streams, for requests to the monitor.
    pub(crate) fn stream(&self, number: u32) -> String {
        format!("fd://{}/{number}", self.process.pid)
    }

    /// Sends a descriptor of the stand-in to the caller's socket, if there is one, with the text that runc sends.
    ///
    /// # Errors
    /// The socket cannot be connected.
    pub(crate) fn send_pidfd(&self, socket: Option<&Path>) -> Result<(), OciError> {
        let Some(socket) = socket else { return Ok(()) };
        let text: &[u8] = if self.is_init { b"standard" } else { b"setns" };
        let send = || {
            let pid = Pid::from_raw(self.process.pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
            let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
            let stream = UnixStream::connect(socket)?;
            send_with_fd(stream.as_fd(), text, Some(&pidfd)).map(drop)
        };
        Ok(send().map_err(FileError::at("send the descriptor of the process to the socket", socket))?)
    }

    /// The process exists in the guest. `anchor` is the host process whose namespaces the stand-in enters.
    ///
    /// # Errors
    /// The stand-in has ended.
    pub(crate) fn go(mut self, anchor: u32) -> Result<(), OciError> {
        writeln!(self.orders, "{anchor}")
            .map_err(OciError::io("reach the process that stands for the container"))
    }
}

fn main(args: Vec<String>) -> ExitCode {
    let waited = args.first().ok_or_else(|| "no parameters".to_owned()).and_then(|params| {
        let params: StandInParams = serde_json::from_str(params).map_err(|error| error.to_string())?;
        run(&params)
    });
    match waited {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // The streams are the container's until the order has come, and /dev/null or its terminal afterwards.
            tracing::error!("{error}");
            ExitCode::from(LOST)
        }
    }
}

fn run(params: &StandInParams) -> Result<u8, String> {
    let orders = sys::inherit::take(ORDERS_FD).map_err(|error| error.to_string())?;
    if params.terminal {
        // Makes changes of the terminal's size known by SIGWINCH. `detach` has made this process a session leader.
        ioctl_tiocsctty(io::stdin().as_fd()).map_err(|error| error.to_string())?;
    }
    let id = ContainerId::parse(&params.id).map_err(|error| error.to_string())?;
    let connection = params.pod.with_socket(|path| UnixStream::connect(path));
    let connection = connection.map_err(|error| format!("cannot connect to the monitor: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    // Before the order comes: a signal that arrives early is not lost.
    let signals = runtime.block_on(async { ForwardedSignals::new() }).map_err(|error| error.to_string())?;
    let mut order = String::new();
    BufReader::new(File::from(orders)).read_line(&mut order).map_err(|error| error.to_string())?;
    let Ok(anchor) = order.trim().parse::<u32>() else { return Err("the verb has ended".to_owned()) };
    if !params.terminal {
        release_streams().map_err(|error| error.to_string())?;
    }
    // The streams are what matters; without the namespaces clients see those of the host's init.
    if let Err(error) = join(anchor) {
        tracing::warn!("cannot enter the namespaces of process {anchor}: {error}");
    }
    runtime.block_on(async {
        let monitor = MonitorClient::over(&id, connection).map_err(|error| chain(&error))?;
        follow(&monitor, params, signals).await.map_err(|error| chain(&error))
    })
}

/// Replaces the standard streams by /dev/null, so that their other ends notice when the container closes them.
fn release_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// Enters the cgroups and namespaces of the container's anchor, with its root, and gives up all capabilities.
fn join(anchor: u32) -> io::Result<()> {
    let own = std::process::id();
    let present = cgroup::of_process(own).map_err(io::Error::other)?;
    let mut groups = cgroup::of_process(anchor).map_err(io::Error::other)?;
    // An ordinary user may not even write where nothing would change.
    groups.retain(|group| !present.contains(group));
    if let Err(error) = cgroup::enter(&groups, own) {
        tracing::warn!("cannot enter the cgroups of process {anchor}: {}", chain(&error));
    }
    let pid = Pid::from_raw(anchor.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let all = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNS;
    setns(pidfd, all)?;
    sys::drop_capabilities()
}

/// Waits for the end of the process, and passes on signals and sizes meanwhile. Removes a process that was added.
async fn follow(
    monitor: &MonitorClient,
    params: &StandInParams,
    mut signals: ForwardedSignals,
) -> Result<u8, OciError> {
    let exec = params.exec.as_str();
    if params.terminal {
        pass_on_size(monitor, exec).await;
    }
    let status = {
        let mut waited = std::pin::pin!(monitor.wait(exec));
        loop {
            tokio::select! {
                status = &mut waited => break status?,
                signal = signals.next() => match signal {
                    libc::SIGWINCH => pass_on_size(monitor, exec).await,
                    signal => {
                        if let Err(error) = monitor.kill(exec, signal.cast_unsigned(), false).await {
                            tracing::debug!("signal {signal} was not passed on: {}", chain(&error));
                        }
                    }
                },
            }
        }
    };
    if !exec.is_empty() {
        monitor.delete(exec).await?;
    }
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

/// Sets the size of the process's terminal in the guest to that of the terminal on the host.
async fn pass_on_size(monitor: &MonitorClient, exec: &str) {
    let Ok(size) = tcgetwinsize(io::stdin()) else { return };
    if size.ws_col == 0 || size.ws_row == 0 {
        return;
    }
    // Fails if the process has ended, which is noticed otherwise.
    if let Err(error) = monitor.resize(exec, size.ws_col, size.ws_row).await {
        tracing::debug!("the terminal's size was not passed on: {}", chain(&error));
    }
}

/// The signals that are passed on: those that a process can catch and that users send.
struct ForwardedSignals(mpsc::UnboundedReceiver<i32>);

impl ForwardedSignals {
    /// Must be called inside a tokio runtime.
    fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::unbounded_channel();
        for number in [
            libc::SIGHUP,
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGTERM,
            libc::SIGWINCH,
        ] {
            tokio::spawn(pass(signal(SignalKind::from_raw(number))?, number, sender.clone()));
        }
        Ok(Self(receiver))
    }

    async fn next(&mut self) -> i32 {
        match self.0.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }
}

async fn pass(mut signals: Signal, number: i32, to: mpsc::UnboundedSender<i32>) {
    while signals.recv().await.is_some() && to.send(number).is_ok() {}
}
