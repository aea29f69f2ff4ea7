//! Starts QEMU: makes everything that QEMU inherits, and removes it again if QEMU does not answer.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::OpenOptionsExt as _, net::UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use machinen_base::{
    error::{ErrorKind, HasKind, chain},
    fs::{FileError, create_private_dir},
    process::{Child, ChildLimits, ProcessError, ReservedUser, Spawn, Stdio, add_forker, prepare_for_twins},
};
use machinen_protocol::preamble::Wake;
use tokio::{
    net::{UnixStream, unix::pipe},
    sync::{broadcast, mpsc, watch},
};

use crate::{
    Vm,
    asset::{self, AssetFileError},
    boot::Boot,
    bounded_log::BoundedLog,
    channel::{GuestEnd, VmChannel, VmChannelError},
    cpu::CpuModel,
    driver::{self, Inputs, QemuOutput, RunningVm, Slots, StopRequest, VmDir},
    exit::{ExitEvidence, VmExit},
    qemu::{
        argv::{self, Start, fd},
        jail,
        qmp::{Qmp, QmpError, QmpEvent},
        slots::{self, SlotDisks},
        snapshot::{self, OriginalQemu, VmSnapshot, VmSnapshotError},
        twin,
    },
    spec::VmSpec,
    tap::{self, TapDevices},
};

/// The file in the VM's directory that has the guest's console output.
pub(crate) const CONSOLE_LOG: &str = "console.log";

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The kernel or the image cannot be used.
    #[error(transparent)]
    Asset(AssetFileError),
    /// The directory of the VM cannot be made or written to.
    #[error("cannot {action} in the VM's directory {}", dir.display())]
    Dir {
        /// What failed: a verb that fits the text, such as `make console.log`.
        action: &'static str,
        /// Path of the directory.
        dir: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The host cannot make what QEMU inherits.
    #[error("cannot {action} for QEMU")]
    Host {
        /// What failed: a verb that fits the text, such as `make a pipe`.
        action: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// There is no user for QEMU to run as.
    #[error("cannot find a user for QEMU")]
    User(#[source] FileError),
    /// The channel to the guest cannot be made.
    #[error(transparent)]
    Channel(VmChannelError),
    /// The program cannot be executed or supervised.
    #[error("cannot run QEMU")]
    Qemu(#[source] ProcessError),
    /// QEMU ended before it answered.
    #[error("QEMU did not start: {exit} (machinen needs QEMU {oldest} or newer{cpu})", oldest = super::qmp::OLDEST)]
    Exited {
        /// Why QEMU ended.
        exit: VmExit,
        /// The processor that it was asked for.
        cpu: CpuModel,
    },
    /// QEMU runs, and its monitor does not answer as it should.
    #[error("QEMU's monitor does not work")]
    Monitor(#[source] QmpError),
}

impl HasKind for LaunchError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Asset(error) => error.kind(),
            Self::Qemu(ProcessError::NotFound { .. }) => ErrorKind::NotFound,
            Self::Monitor(QmpError::TooOld(_)) => ErrorKind::FailedPrecondition,
            _ => ErrorKind::Internal,
        }
    }
}

/// What a VM starts from.
#[derive(Debug)]
pub(crate) enum LaunchOrigin<'a> {
    Boot,
    /// A boot with this memory, until the agent waits.
    Template {
        memory: OwnedFd,
        disks: &'a SlotDisks,
    },
    Clone {
        snapshot: &'a VmSnapshot,
        disks: &'a SlotDisks,
    },
    /// A clone whose QEMU is a twin of the template's, with this pid.
    Twin {
        snapshot: &'a VmSnapshot,
        original: &'a OriginalQemu,
        disks: &'a SlotDisks,
    },
}

impl LaunchOrigin<'_> {
    fn start(&self) -> Start {
        match self {
            Self::Boot => Start::Boot,
            Self::Template { .. } => Start::Template,
            Self::Clone { .. } | Self::Twin { .. } => Start::Clone,
        }
    }
}

/// A QEMU that answers and has no driver yet. It must be handed over to one, or ended.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) qmp: Qmp,
    pub(crate) events: broadcast::Receiver<QmpEvent>,
    running: RunningVm,
    taps: Option<TapDevices>,
}

pub(crate) async fn launch(spec: VmSpec, dir: &Path) -> Result<Vm, LaunchError> {
    Ok(begin(&spec, dir, LaunchOrigin::Boot).await?.hand_over(spec, Slots::Absent))
}

/// As [`launch`], but from the snapshot of another VM.
pub(crate) async fn clone(
    spec: VmSpec,
    dir: &Path,
    snapshot: &VmSnapshot,
    disks: Option<SlotDisks>,
) -> Result<Vm, VmSnapshotError> {
    snapshot.check()?;
    let disks = disks.map_or_else(SlotDisks::holes, Ok);
    let disks = disks.map_err(|error| VmSnapshotError::Disk(Box::new(error)))?;
    if let Ok(original) = &snapshot.original {
        let origin = LaunchOrigin::Twin { snapshot, original, disks: &disks };
        match begin(&spec, dir, origin).await {
            Ok(mut launched) => {
                return match launched.proceed(&disks).await {
                    Ok(()) => {
                        let vm = launched.hand_over(spec, Slots::Present(disks));
                        Ok(Vm { is_twin: true, ..vm })
                    }
                    Err(error) => Err(error.with_exit(&launched.end().await)),
                };
            }
            Err(error) => tracing::warn!("a clone is no twin of its template's QEMU: {}", chain(&error)),
        }
    }
    let origin = LaunchOrigin::Clone { snapshot, disks: &disks };
    let mut launched = begin(&spec, dir, origin).await?;
    match launched.restore(snapshot, &disks).await {
        Ok(()) => {
            let vm = launched.hand_over(spec, Slots::Present(disks));
            Ok(Vm { working_set: snapshot.working_set.clone(), ..vm })
        }
        Err(error) => Err(error.with_exit(&launched.end().await)),
    }
}

/// Starts QEMU and returns when it answers.
pub(crate) async fn begin(
    spec: &VmSpec,
    dir: &Path,
    origin: LaunchOrigin<'_>,
) -> Result<Launched, LaunchError> {
    let kernel = asset::KERNEL.open(&spec.kernel).map_err(LaunchError::Asset)?;
    let image = asset::IMAGE.open(&spec.image).map_err(LaunchError::Asset)?;
    let user = ReservedUser::reserve().map_err(LaunchError::User)?;
    let dir = make_dir(dir)?;
    let (channel, guest_end) = match VmChannel::prepare(spec, origin.start(), &dir.path).await {
        Ok(prepared) => prepared,
        Err(error) => {
            dir.clean(false);
            return Err(LaunchError::Channel(error));
        }
    };
    let channel = Arc::new(channel);
    let in_use = match origin {
        LaunchOrigin::Clone { snapshot, .. } | LaunchOrigin::Twin { snapshot, .. } => snapshot.in_use.clone(),
        LaunchOrigin::Boot | LaunchOrigin::Template { .. } => None,
    };
    let version = match &origin {
        LaunchOrigin::Twin { snapshot, .. } => Some(snapshot.qemu),
        _ => None,
    };
    let started = start(spec, origin, &dir.path, guest_end, kernel, image, &user).await;
    let StartedQemu { qemu, monitor, wake, console, stderr, taps } = match started {
        Ok(started) => started,
        Err(error) => {
            if let Err(error) = channel.close().await {
                tracing::warn!("{}", chain(&error));
            }
            dir.clean(false);
            return Err(error);
        }
    };
    let running = RunningVm {
        qemu,
        channel,
        wake,
        console,
        stderr,
        dir,
        keep_console: spec.keep_console,
        in_use,
        user,
    };
    let monitor = match version {
        // The original's monitor has greeted.
        Some(version) => Qmp::resume(monitor, version),
        None => Qmp::connect(monitor).await,
    };
    match monitor {
        Ok((qmp, events)) => Ok(Launched { qmp, events, running, taps }),
        Err(error) => Err(failed(running, error, &spec.cpu).await),
    }
}

impl Launched {
    pub(crate) fn pid(&self) -> u32 {
        self.running.qemu.pid()
    }

    /// Lets QEMU write to files as far as `bytes`, where it may not anyway.
    ///
    /// # Errors
    /// The limit of QEMU cannot be raised.
    pub(crate) fn allow_to_write(&self, bytes: u64) -> Result<(), ProcessError> {
        if !ChildLimits::can_be_raised() {
            return Ok(());
        }
        self.running.qemu.limits().allow_file_size(bytes)
    }

    /// The host's end of the wake port, which templates and clones have.
    pub(crate) fn wake_port(&mut self) -> &mut UnixStream {
        self.running.wake.as_mut().expect("asked of a template or a clone")
    }

    /// What the agent of a clone has to know before it can reach the host.
    pub(crate) fn wake(&self) -> Wake {
        Wake { control_port: self.running.channel.control_port() }
    }

    /// Lets the guest continue.
    async fn restore(&mut self, snapshot: &VmSnapshot, disks: &SlotDisks) -> Result<(), VmSnapshotError> {
        let allowed = disks.allow_to_write(&self.running.qemu.limits());
        allowed.map_err(|error| VmSnapshotError::Disk(Box::new(error)))?;
        snapshot::restore(self, snapshot).await
    }

    /// Starts the driver task, which owns QEMU from now on.
    fn hand_over(self, spec: VmSpec, slots: Slots) -> Vm {
        let Self { qmp, events, running, taps } = self;
        let (requests, request_queue) = mpsc::channel(16);
        let (stop, stopped) = watch::channel(StopRequest::No);
        let (exit_sender, exit) = watch::channel(None);
        let (agent_sender, agent) = watch::channel(None);
        let (pid, channel) = (running.qemu.pid(), Arc::clone(&running.channel));
        tracing::debug!(pid, version = %qmp.version(), "QEMU answers");
        let console = running.console.bounded_log.clone();
        let boot = Boot {
            channel: Arc::clone(&channel),
            console: console.clone(),
            hostname: spec.hostname.clone(),
            timeout: spec.boot_timeout,
            exit: exit.clone(),
        };
        tokio::spawn(async move {
            agent_sender.send_replace(Some(boot.run().await));
        });
        let inputs = Inputs { events, requests: request_queue, stop: stopped, agent: agent.clone(), slots };
        tokio::spawn(async move {
            let exit = driver::drive(running, qmp, inputs).await;
            tracing::debug!(pid, "VM has ended: {exit}");
            exit_sender.send_replace(Some(exit));
        });
        let taps = taps.map(Arc::new);
        let (spec, stop) = (Arc::new(spec), Arc::new(stop));
        Vm {
            pid,
            spec,
            channel,
            taps,
            console,
            requests,
            stop,
            agent,
            exit,
            working_set: None,
            is_twin: false,
        }
    }

    /// Leaves QEMU as the original of twins, after its state was saved.
    ///
    /// # Errors
    /// It cannot have twins. Nothing is left of it then.
    pub(crate) async fn stand_still(
        self,
        spec: &VmSpec,
        memory: &OwnedFd,
        memory_fd: i32,
        disks: &SlotDisks,
    ) -> io::Result<(OriginalQemu, Child)> {
        let pid = self.pid();
        let stop = || -> io::Result<_> {
            let mut files = disks.inherited()?;
            files.push((memory.try_clone()?, fd::MEMORY));
            files.push((File::open(&spec.kernel)?.into(), fd::KERNEL));
            files.push((File::open(&spec.image)?.into(), fd::IMAGE));
            let numbers = files.iter().map(|(file, number)| Ok((*number, snapshot::numbers_of(pid, file)?)));
            let numbers = numbers.collect::<io::Result<_>>()?;
            prepare_for_twins(pid, memory, memory_fd)?;
            // It notices no end of its sockets, whose other ends are closed after this.
            self.running.qemu.stop().map_err(io::Error::other)?;
            Ok(OriginalQemu { pid, forker: add_forker(pid)?.forker, numbers })
        };
        let original = match stop() {
            Ok(original) => original,
            Err(error) => {
                self.end().await;
                return Err(error);
            }
        };
        let RunningVm { qemu, dir, .. } = self.running;
        dir.clean(false);
        Ok((original, qemu))
    }

    /// Lets the guest of a twin continue.
    async fn proceed(&mut self, disks: &SlotDisks) -> Result<(), VmSnapshotError> {
        let allowed = disks.allow_to_write(&self.running.qemu.limits());
        allowed.map_err(|error| VmSnapshotError::Disk(Box::new(error)))?;
        snapshot::proceed(self).await
    }

    /// Ends QEMU, unless it has ended already. Nothing is left of it when this returns.
    pub(crate) async fn end(self) -> VmExit {
        let Self { qmp, mut events, running, .. } = self;
        // A QEMU that has closed its monitor has ended, and its own reason is the one to report.
        let requested = qmp.execute("quit", serde_json::json!({})).await.is_ok();
        drop(qmp);
        let mut evidence = ExitEvidence { requested, ..ExitEvidence::default() };
        match running.qemu.terminate(EXITING).await {
            Ok(exit) => {
                driver::record_last_events(&mut evidence, &mut events).await;
                running.finish(&evidence, exit).await
            }
            Err(error) => {
                tracing::error!("cannot end a VM: {}", chain(&error));
                VmExit::Requested
            }
        }
    }
}

/// The error of a QEMU that never answered. Its stderr explains more than its closed monitor does.
async fn failed(running: RunningVm, error: QmpError, cpu: &CpuModel) -> LaunchError {
    let closed = matches!(error, QmpError::Closed | QmpError::Io(_));
    let ended = if closed { running.qemu.terminate(EXITING).await } else { running.qemu.kill().await };
    let exit = match ended {
        Ok(exit) => exit,
        Err(error) => return LaunchError::Qemu(error),
    };
    let reason = running.finish(&ExitEvidence::default(), exit).await;
    if closed { LaunchError::Exited { exit: reason, cpu: cpu.clone() } } else { LaunchError::Monitor(error) }
}

/// How long a QEMU that has closed its monitor may take to exit.
const EXITING: std::time::Duration = std::time::Duration::from_secs(5);

struct StartedQemu {
    qemu: Child,
    monitor: StdUnixStream,
    wake: Option<UnixStream>,
    console: QemuOutput,
    stderr: QemuOutput,
    taps: Option<TapDevices>,
}

async fn start(
    spec: &VmSpec,
    origin: LaunchOrigin<'_>,
    dir: &Path,
    guest_end: GuestEnd,
    kernel: File,
    image: File,
    user: &ReservedUser,
) -> Result<StartedQemu, LaunchError> {
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
    let watched = |socket: StdUnixStream| {
        socket
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(socket))
            .map_err(failed("watch a socket"))
    };
    let console = watched(console)?;
    let stderr = pipe::Receiver::from_owned_fd(stderr.into()).map_err(failed("watch a pipe"))?;

    let mut args = argv::argv(spec, origin.start(), guest_end.cid);
    let mut jail = jail::jail(spec, origin.start(), user.run_as(spec.accel.groups()));
    let mut inherited: Vec<(OwnedFd, i32)> = vec![
        (monitor_end.into(), fd::QMP),
        (console_end.into(), fd::CONSOLE),
        (kernel.into(), fd::KERNEL),
        (image.into(), fd::IMAGE),
        (guest_end.fd, fd::CHANNEL),
    ];
    let in_slots = match &origin {
        LaunchOrigin::Boot => None,
        LaunchOrigin::Template { disks, .. }
        | LaunchOrigin::Clone { disks, .. }
        | LaunchOrigin::Twin { disks, .. } => Some(*disks),
    };
    if let Some(disks) = in_slots {
        args.extend(slots::args());
        inherited.extend(disks.inherited().map_err(failed("duplicate a descriptor"))?);
    }
    let mut twin_of = None;
    let memory = match origin {
        LaunchOrigin::Boot => None,
        LaunchOrigin::Template { memory, .. } => Some(memory),
        LaunchOrigin::Clone { snapshot, .. } | LaunchOrigin::Twin { snapshot, .. } => {
            if let LaunchOrigin::Twin { original, .. } = origin {
                let turn = snapshot.turn().map_err(failed("open a lock"))?;
                twin_of = Some((original, turn));
            }
            jail.ignore_hole_punching = Some(snapshot.memory_fd);
            Some(snapshot.memory.as_fd().try_clone_to_owned().map_err(failed("duplicate a descriptor"))?)
        }
    };
    let wake = match memory {
        None => None,
        Some(memory) => {
            let (wake, wake_end) = StdUnixStream::pair().map_err(failed("make a socket pair"))?;
            inherited.extend([(memory, fd::MEMORY), (wake_end.into(), fd::WAKE)]);
            Some(watched(wake)?)
        }
    };
    let mut taps = None;
    let mut netns = None;
    if spec.nics > 0 {
        let (devices, fds) = TapDevices::create(spec.nics).map_err(failed("make a tap device"))?;
        inherited.extend(fds.into_iter().zip(fd::FIRST_TAP..));
        let vhost = (0..spec.vhost_nics).map(|_| tap::open_vhost()).collect::<io::Result<Vec<_>>>();
        inherited.extend(vhost.map_err(failed("open /dev/vhost-net"))?.into_iter().zip(fd::FIRST_VHOST..));
        // One namespace is enough for the devices and for QEMU, which can do nothing with the devices there.
        netns = Some(devices.namespace.try_clone().map_err(failed("duplicate a descriptor"))?);
        jail.namespaces.net = false;
        taps = Some(devices);
    }
    if let Some(original) = twin_of {
        let (original, turn) = original;
        let qemu = twin::make(spec, original, turn, jail, inherited, stderr_end.into()).await?;
        let (console, stderr) = (read(console, Some(log)), read(stderr, None));
        return Ok(StartedQemu { qemu, monitor, wake, console, stderr, taps });
    }
    let mut spawn = Spawn::new(&spec.qemu).args(args).stderr(Stdio::Fd(stderr_end.into())).jail(jail);
    if let Some(netns) = netns {
        spawn = spawn.join_netns(netns);
    }
    for (fd, number) in inherited {
        spawn = spawn.fd(fd, number);
    }
    let qemu = spawn.start().map_err(LaunchError::Qemu)?;
    let (console, stderr) = (read(console, Some(log)), read(stderr, None));
    Ok(StartedQemu { qemu, monitor, wake, console, stderr, taps })
}

fn read(source: impl tokio::io::AsyncRead + Unpin + Send + 'static, log: Option<File>) -> QemuOutput {
    let bounded_log = BoundedLog::default();
    let reader = tokio::spawn(bounded_log.clone().read(source, log));
    QemuOutput { bounded_log, reader }
}

fn make_dir(path: &Path) -> Result<VmDir, LaunchError> {
    let dir = path.to_owned();
    match create_private_dir(path) {
        Ok(made) => Ok(VmDir { path: dir, made }),
        Err(source) => Err(LaunchError::Dir { action: "work", dir, source }),
    }
}
