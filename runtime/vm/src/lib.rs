//! A microVM: QEMU, its disks and its channel.
//!
//! ```text
//!   Vm (handle) ──requests──> driver task ──QMP──> QEMU <──channel── guest agent
//!        └──────────────── streams, agent calls ──────────────────────┘
//! ```
//! [`Vm::launch`] returns when QEMU answers, while the guest still boots, so that disks can be attached
//! meanwhile; [`Vm::agent`] resolves when the guest is ready. The driver task alone changes the VM and ends
//! it; when the last handle is dropped it kills the VM. Nothing is left of the VM when [`Vm::exited`]
//! resolves.

#![warn(missing_docs)]

pub mod accel;
pub mod admission;
pub mod agent;
mod asset;
pub mod assets;
mod boot;
mod bounded_log;
mod channel;
mod cpu;
mod driver;
mod exit;
mod qemu;
mod spec;
mod tap;
pub mod template;
mod wake;

use std::{io, path::Path, sync::Arc, time::Duration};

use machinen_base::{
    error::{ErrorKind, HasKind},
    process::ProcessError,
};
use tokio::sync::{mpsc, oneshot, watch};

use bounded_log::BoundedLog;
use channel::VmChannel;
use driver::{StopRequest, VmRequest};
use qemu::launch;
use template::working_set::WorkingSet;

pub use asset::AssetFileError;
pub use boot::VmBootError;
pub use bounded_log::LogPiece;
#[cfg(fuzzing)]
pub use channel::greet;
pub use channel::{BoxedStream, ByteStream, ChannelMode, HostSupport, VmChannelError, choose_channel};
pub use cpu::{CpuModel, CpuModelError};
pub use exit::VmExit;
pub use qemu::{
    argv::TRANSLATED_CODE_MIB,
    hotplug::{DiskAddress, DiskBacking, DiskSpec},
    launch::LaunchError,
    qmp::{QemuVersion, QmpError},
    slots::SlotDisks,
    snapshot::{OriginalQemu, VmSnapshot, VmSnapshotError},
    version::{QemuError, qemu_version},
};
pub use spec::{ChannelKind, MAX_NICS, VmSpec};
pub use tap::{TapDevices, tap_name, try_vhost};

/// How long a VM may take to end after its agent has closed the control stream.
const LAST_MOMENTS: Duration = Duration::from_millis(250);

/// Why something about a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// QEMU could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The guest did not become ready.
    #[error(transparent)]
    Boot(Arc<VmBootError>),
    /// QEMU refused a disk.
    #[error("cannot attach disk {serial}")]
    Attach {
        /// The serial of the [`DiskSpec`].
        serial: String,
        /// What QEMU answered.
        source: QmpError,
    },
    /// The disk cannot be attached to any VM, or not to this one.
    #[error("cannot attach disk {serial}: {reason}")]
    Disk {
        /// The serial of the [`DiskSpec`].
        serial: String,
        /// What is wrong with the disk.
        reason: &'static str,
    },
    /// The file of a disk cannot be opened for QEMU.
    #[error("cannot open the file of disk {serial} for QEMU")]
    DiskFile {
        /// The serial of the [`DiskSpec`].
        serial: String,
        /// What the system answered.
        source: io::Error,
    },
    /// QEMU cannot be allowed to write a file as large as the disk.
    #[error("cannot let QEMU write to disk {serial}")]
    DiskLimit {
        /// The serial of the [`DiskSpec`].
        serial: String,
        /// Why the limit of QEMU cannot be raised.
        source: ProcessError,
    },
    /// QEMU did not remove a disk.
    #[error("cannot detach the disk at {address}")]
    Detach {
        /// Where the guest has the disk.
        address: DiskAddress,
        /// What QEMU answered.
        source: QmpError,
    },
    /// There is no disk at this address.
    #[error("no disk is attached at {0}")]
    NoDisk(DiskAddress),
    /// The agent cannot be reached with a new stream.
    #[error("cannot open a stream into the VM")]
    Stream(#[source] VmChannelError),
    /// The VM has ended, for this reason.
    #[error("the VM has ended: {0}")]
    Exited(VmExit),
}

impl HasKind for VmError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Launch(error) => error.kind(),
            Self::Boot(error) => error.kind(),
            Self::Exited(_) => ErrorKind::Unavailable,
            Self::NoDisk(_) => ErrorKind::NotFound,
            Self::Stream(VmChannelError::Deadline) => ErrorKind::DeadlineExceeded,
            Self::Stream(_) => ErrorKind::Unavailable,
            Self::Attach { .. }
            | Self::Disk { .. }
            | Self::DiskFile { .. }
            | Self::DiskLimit { .. }
            | Self::Detach { .. } => ErrorKind::Internal,
        }
    }
}

/// A handle on a VM; clones are cheap and equal.
#[derive(Debug, Clone)]
pub struct Vm {
    pid: u32,
    spec: Arc<VmSpec>,
    channel: Arc<VmChannel>,
    taps: Option<Arc<TapDevices>>,
    console: BoundedLog,
    requests: mpsc::Sender<VmRequest>,
    stop: Arc<watch::Sender<StopRequest>>,
    agent: watch::Receiver<Option<Result<agent::Client, Arc<VmBootError>>>>,
    exit: watch::Receiver<Option<VmExit>>,
    /// What is known of the template, if the VM is a clone that has loaded its state.
    working_set: Option<Arc<WorkingSet>>,
    is_twin: bool,
}

impl Vm {
    /// Starts QEMU and returns when it answers; the guest boots meanwhile. Must be called inside a tokio
    /// runtime, on a thread that lives as long as the VM shall (see [`machinen_base::process::Spawn`]).
    ///
    /// `dir` is the VM's own directory, made if it is missing. It holds `console.log` and sockets while the
    /// VM runs.
    ///
    /// # Errors
    /// A file is missing or not readable, QEMU is missing, too old or refuses its arguments, or the channel
    /// cannot be made. Then nothing is left, except perhaps `console.log`.
    pub async fn launch(spec: VmSpec, dir: &Path) -> Result<Self, VmError> {
        Ok(launch::launch(spec, dir).await?)
    }

    /// As [`Vm::launch`], but the guest continues from `snapshot` instead of booting. `spec` must be the one
    /// of the snapshot, except for `id`, `hostname` and `keep_console`. With `disks` the guest has these disks from
    /// the start, at [`SlotDisks::ADDRESSES`].
    ///
    /// # Errors
    /// QEMU does not start, or does not load the snapshot. Then nothing is left, and the same VM can be
    /// launched.
    pub async fn restore(
        spec: VmSpec,
        dir: &Path,
        snapshot: &VmSnapshot,
        disks: Option<SlotDisks>,
    ) -> Result<Self, VmSnapshotError> {
        launch::clone(spec, dir, snapshot, disks).await
    }

    /// Records which of its template's memory a clone has written to by now, if no clone has: later ones get these pages ahead of
    /// time. To be called before anything of a user's runs in the VM. A failure is logged.
    pub async fn record_working_set(&self) {
        let Some(set) = self.working_set.clone() else { return };
        let pid = self.pid;
        let recorded = tokio::task::spawn_blocking(move || set.record(pid)).await;
        if let Err(error) = recorded.map_err(io::Error::other).flatten() {
            tracing::warn!(pid, "cannot record which memory a clone writes to: {error}");
        }
    }

    /// Whether the VM is a clone whose QEMU is a twin of the template's, and so has all that it has translated.
    pub fn is_twin(&self) -> bool {
        self.is_twin
    }

    /// QEMU's pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The description that the VM was started with.
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The tap devices of the VM's network devices, if the VM has any.
    pub fn taps(&self) -> Option<&TapDevices> {
        self.taps.as_deref()
    }

    /// What the guest has printed on its console after the first `from` bytes. With `wait` an empty piece means that the
    /// VM has ended. The text is the guest's own, and may contain anything.
    pub async fn console(&self, from: u64, wait: bool) -> LogPiece {
        self.console.after(from, wait).await
    }

    /// The guest agent, as soon as it has answered and been configured. Any number of callers may wait, at
    /// any time.
    ///
    /// # Errors
    /// The boot deadline has passed, the VM has ended, or the agent has another version; with the last
    /// console lines. This error does not end the VM.
    pub async fn agent(&self) -> Result<agent::Client, VmError> {
        let mut agent = self.agent.clone();
        let state = agent.wait_for(Option::is_some).await.ok().and_then(|state| state.clone());
        match state {
            Some(Ok(client)) => Ok(client),
            Some(Err(error)) => Err(VmError::Boot(error)),
            None => Err(self.ended().await),
        }
    }

    /// Gives a clone that was made before its pod was known the pod's hostname, a new identity and the time. [`Vm::agent`] of
    /// the result waits for that, and fails if the guest's agent refuses.
    pub fn configured_as(self, hostname: String) -> Self {
        let (configured, agent) = watch::channel(None);
        let before = self.clone();
        tokio::spawn(async move {
            let configuration = async {
                let agent = match before.agent().await {
                    Err(VmError::Boot(error)) => return Some(Err(error)),
                    // The VM has ended, which callers see.
                    agent => agent.ok()?,
                };
                let accepted = boot::configure_guest(&agent, &hostname, String::new).await;
                Some(accepted.map(|()| agent).map_err(Arc::new))
            };
            configured.send_replace(configuration.await);
        });
        Self { agent, ..self }
    }

    /// Attaches a disk to the virtio-scsi controller, in a place that the guest of a clone knows if there is one
    /// left. This is legal as soon as [`Vm::launch`] has returned.
    ///
    /// # Errors
    /// QEMU refuses, the descriptor does not fit `read_only`, all 256 targets are taken, or the VM has ended.
    pub async fn attach_disk(&self, disk: DiskSpec) -> Result<DiskAddress, VmError> {
        self.request(|answer| VmRequest::Attach(disk, answer)).await
    }

    /// Detaches a disk, which the guest must have unmounted.
    ///
    /// # Errors
    /// There is no such disk, QEMU refuses, or the VM has ended.
    pub async fn detach_disk(&self, address: DiskAddress) -> Result<(), VmError> {
        self.request(|answer| VmRequest::Detach(address, answer)).await
    }

    /// Removes the disks without content that a clone has from its template, when the first container has all of its disks.
    ///
    /// # Errors
    /// QEMU refuses, or the VM has ended.
    pub async fn close_slots(&self) -> Result<(), VmError> {
        self.request(VmRequest::CloseSlots).await
    }

    /// Opens a raw stream into the guest. The token names the stream in calls to the agent. This is legal as
    /// soon as [`Vm::agent`] has resolved.
    ///
    /// # Errors
    /// The agent refuses, does not answer in time, or is gone.
    pub async fn open_stream(&self) -> Result<(u64, BoxedStream), VmError> {
        self.channel.open_stream().await.map_err(VmError::Stream)
    }

    /// Resolves when the VM has ended and nothing is left of it. Any number of callers may wait, at any time.
    pub fn exited(&self) -> impl Future<Output = VmExit> + Send + 'static {
        let mut exit = self.exit.clone();
        async move {
            let exited = exit.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
            match exited {
                Some(exit) => exit,
                // The driver ends without an exit only when the runtime shuts down, which drops this future
                // too.
                None => std::future::pending().await,
            }
        }
    }

    /// Asks the agent to sync and power off, kills the VM after `grace`, and returns when nothing is left of
    /// it.
    ///
    /// A VM whose agent has not answered yet has nothing to sync and is killed at once.
    pub async fn shutdown(&self, grace: Duration) -> VmExit {
        self.stop.send_if_modified(|stop| {
            let first = matches!(stop, StopRequest::No);
            if first {
                *stop = StopRequest::Within(grace);
            }
            first
        });
        self.exited().await
    }

    /// Ends a VM whose agent has closed the control stream, and returns why the VM ended.
    ///
    /// The end of a process is seen a moment after that of its streams. So the VM may end by itself first, and the reason
    /// is that of QEMU or of the guest, such as a kill by the host's kernel.
    pub async fn end_of_lost(&self) -> VmExit {
        match tokio::time::timeout(LAST_MOMENTS, self.exited()).await {
            Ok(exit) => exit,
            Err(_) => self.kill().await,
        }
    }

    /// Kills the VM and returns when nothing is left of it. What the guest had not synced is lost.
    pub async fn kill(&self) -> VmExit {
        self.stop.send_replace(StopRequest::Now);
        self.exited().await
    }

    async fn request<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<Result<T, VmError>>) -> VmRequest,
    ) -> Result<T, VmError> {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.send(make(answer)).await.is_ok();
        match if sent { answered.await.ok() } else { None } {
            Some(result) => result,
            None => Err(self.ended().await),
        }
    }

    async fn ended(&self) -> VmError {
        VmError::Exited(self.exited().await)
    }
}
