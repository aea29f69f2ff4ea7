//! Starting QEMU: everything it inherits is made here, and taken back if it does not answer.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::Vm;
use super::argv::{self, fd};
use super::asset::{self, AssetError};
use super::boot::Boot;
use super::capture::Capture;
use super::channel::{Channel, ChannelError, GuestEnd};
use super::driver::{self, Dir, Inputs, Output, Running, Stop};
use super::exit::{Seen, VmExit};
use super::qmp::{Qmp, QmpError};
use super::spec::VmSpec;
use crate::error::{ErrorKind, Kind};
use crate::process::{ProcessError, Sandbox, Spawn, Stdio};

/// What the guest printed on its console, in the VM's directory.
pub(super) const CONSOLE_LOG: &str = "console.log";

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(transparent)]
    Asset(AssetError),
    #[error("cannot {action} in the VM's directory {}", dir.display())]
    Dir { action: &'static str, dir: PathBuf, source: io::Error },
    #[error("cannot {action} for QEMU")]
    Host { action: &'static str, source: io::Error },
    #[error(transparent)]
    Channel(ChannelError),
    #[error("cannot run QEMU")]
    Qemu(#[source] ProcessError),
    #[error("QEMU did not start: {exit} (machinen needs QEMU {oldest} or newer)", oldest = super::qmp::OLDEST)]
    Exited { exit: VmExit },
    #[error("QEMU does not work")]
    Monitor(#[source] QmpError),
}

impl Kind for LaunchError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Asset(error) => error.kind(),
            Self::Qemu(ProcessError::NotFound { .. }) => ErrorKind::NotFound,
            Self::Monitor(QmpError::TooOld(_)) => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}

pub(super) async fn launch(spec: VmSpec, dir: &Path) -> Result<Vm, LaunchError> {
    let kernel = asset::KERNEL.open(&spec.kernel).map_err(LaunchError::Asset)?;
    let image = asset::IMAGE.open(&spec.image).map_err(LaunchError::Asset)?;
    let dir = make_dir(dir)?;
    let (channel, guest_end) = match Channel::prepare(&spec, &dir.path).await {
        Ok(prepared) => prepared,
        Err(error) => {
            dir.clean(false);
            return Err(LaunchError::Channel(error));
        }
    };
    let channel = Arc::new(channel);
    let started = start(&spec, &dir.path, guest_end, kernel, image);
    let Started { qemu, monitor, console, stderr } = match started {
        Ok(started) => started,
        Err(error) => {
            if let Err(error) = channel.close().await {
                tracing::warn!("{}", crate::error::chain(&error));
            }
            dir.clean(false);
            return Err(error);
        }
    };
    let console_capture = console.capture.clone();
    let keep_console = spec.keep_console;
    let running = Running { qemu, channel, console, stderr, dir, keep_console };
    match Qmp::connect(monitor).await {
        Ok((qmp, events)) => Ok(hand_over(spec, running, console_capture, qmp, events)),
        Err(error) => Err(failed(running, error).await),
    }
}

/// QEMU runs and answers: from here on its driver owns it.
fn hand_over(
    spec: VmSpec,
    running: Running,
    console: Capture,
    qmp: Qmp,
    events: tokio::sync::broadcast::Receiver<super::qmp::Event>,
) -> Vm {
    let (requests, request_queue) = mpsc::channel(16);
    let (stop, stopped) = watch::channel(Stop::No);
    let (exit_sender, exit) = watch::channel(None);
    let (agent_sender, agent) = watch::channel(None);
    let (pid, channel) = (running.qemu.pid(), Arc::clone(&running.channel));
    tracing::debug!(pid, version = %qmp.version(), "QEMU answers");
    let boot = Boot {
        channel: Arc::clone(&channel),
        console,
        hostname: spec.hostname,
        timeout: spec.boot_timeout,
        exit: exit.clone(),
    };
    tokio::spawn(async move {
        agent_sender.send_replace(Some(boot.run().await));
    });
    let inputs = Inputs { events, requests: request_queue, stop: stopped, agent: agent.clone() };
    tokio::spawn(async move {
        let exit = driver::drive(running, qmp, inputs).await;
        tracing::debug!(pid, "VM has ended: {exit}");
        exit_sender.send_replace(Some(exit));
    });
    Vm { pid, channel, requests, stop: Arc::new(stop), agent, exit }
}

/// QEMU that never answered: its own last words say more than its closed monitor.
async fn failed(running: Running, error: QmpError) -> LaunchError {
    let closed = matches!(error, QmpError::Closed | QmpError::Io(_));
    let ended = if closed { running.qemu.terminate(EXITING).await } else { running.qemu.kill().await };
    let exit = match ended {
        Ok(exit) => exit,
        Err(error) => return LaunchError::Qemu(error),
    };
    let reason = running.finish(&Seen::default(), exit).await;
    if closed { LaunchError::Exited { exit: reason } } else { LaunchError::Monitor(error) }
}

/// A QEMU that has closed its monitor is about to end by itself.
const EXITING: std::time::Duration = std::time::Duration::from_secs(5);

struct Started {
    qemu: crate::process::Child,
    monitor: StdUnixStream,
    console: Output,
    stderr: Output,
}

fn start(
    spec: &VmSpec,
    dir: &Path,
    guest_end: GuestEnd,
    kernel: File,
    image: File,
) -> Result<Started, LaunchError> {
    let failed = |action| move |source| LaunchError::Host { action, source };
    let log = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(dir.join(CONSOLE_LOG))
        .map_err(|source| LaunchError::Dir { action: "make console.log", dir: dir.to_owned(), source })?;
    let (monitor, monitor_end) = StdUnixStream::pair().map_err(failed("make a socket pair"))?;
    let (console, console_end) = StdUnixStream::pair().map_err(failed("make a socket pair"))?;
    let (stderr, stderr_end) = io::pipe().map_err(failed("make a pipe"))?;
    console.set_nonblocking(true).map_err(failed("make a socket pair"))?;
    let console = UnixStream::from_std(console).map_err(failed("watch a socket"))?;
    let stderr = pipe::Receiver::from_owned_fd(stderr.into()).map_err(failed("watch a pipe"))?;

    let mut spawn = Spawn::new(&spec.qemu)
        .args(argv::argv(spec, guest_end.cid))
        .stderr(Stdio::Fd(stderr_end.into()))
        .sandbox(Sandbox::strict(spec.identity.clone()));
    let inherited: [(OwnedFd, i32); 5] = [
        (monitor_end.into(), fd::QMP),
        (console_end.into(), fd::CONSOLE),
        (kernel.into(), fd::KERNEL),
        (image.into(), fd::IMAGE),
        (guest_end.fd, fd::CHANNEL),
    ];
    for (fd, number) in inherited {
        spawn = spawn.fd(fd, number);
    }
    let qemu = spawn.start().map_err(LaunchError::Qemu)?;
    Ok(Started { qemu, monitor, console: read(console, Some(log)), stderr: read(stderr, None) })
}

fn read(source: impl tokio::io::AsyncRead + Unpin + Send + 'static, log: Option<File>) -> Output {
    let capture = Capture::default();
    let reader = tokio::spawn(capture.clone().read(source, log));
    Output { capture, reader }
}

fn make_dir(path: &Path) -> Result<Dir, LaunchError> {
    let dir = path.to_owned();
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(Dir { path: dir, made: true }),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Dir { path: dir, made: false }),
        Err(source) => Err(LaunchError::Dir { action: "work", dir, source }),
    }
}
