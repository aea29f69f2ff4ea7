//! The state of a VM whose agent waits to be woken, made once and cloned many times.
//!
//! ```text
//!   save:     boot with the memory in a memfd -> "waiting" -> stop -> device state by a pipe -> quit -> seal
//!   restore:  -incoming defer, the memory copy on write -> device state by a pipe -> wake -> cont
//! ```
//! The memory is a memfd, because only a memfd can be sealed: QEMU opens the memory for writing (before 8.2
//! it cannot do otherwise), and runs as a user that a guest may have taken over.
//!
//! QEMU gives memory back to the host by punching holes into the memory's file, even if it maps the file
//! privately. For a clone that must have no effect on the file. The madvise(2) that follows frees the clone's
//! own copy.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use machinen_base::{
    error::{ErrorKind, HasKind},
    memfd,
    process::Child,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::broadcast,
    time::timeout,
};

use crate::{
    LaunchError, VmExit, VmSpec,
    qemu::{
        argv::fd,
        launch::{LaunchOrigin, Launched, begin},
        qmp::{QemuVersion, QmpError, QmpEvent},
        slots::{SLOTS, SlotDisks},
    },
    template::working_set::WorkingSet,
    wake::{self, WakeError},
};

/// The state of microvm's devices is some 60 KiB; the rest is for more disks and CPUs.
const MAX_DEVICES: u64 = 16 << 20;

/// The id of the VM of which a template is made.
pub(crate) const ORIGINAL: &str = "template";

/// QEMU reads or writes the device state in milliseconds.
const DEADLINE: Duration = Duration::from_secs(20);

/// The QEMU of a template, which stands still, and of which clones are twins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginalQemu {
    /// Its pid on the host.
    pub pid: u32,
    /// The id of its thread that twins fork from.
    pub forker: u32,
    /// The numbers of its descriptors for each file that QEMU inherits, by the number under which it is inherited.
    pub numbers: BTreeMap<i32, Vec<i32>>,
}

/// The state of a VM that waits to be woken. It can be restored any number of times.
pub struct VmSnapshot {
    /// A sealed memfd of the VM's memory size.
    pub memory: OwnedFd,
    /// QEMU's migration stream without the memory.
    pub devices: Vec<u8>,
    /// The number under which QEMU has opened the memory.
    pub memory_fd: i32,
    /// The version of QEMU that wrote the stream; no other version can read it.
    pub qemu: QemuVersion,
    /// The QEMU that clones are twins of, or why there is none.
    pub original: Result<OriginalQemu, String>,
    /// The process of the original, if this one has started it. It ends with this value.
    pub original_process: Option<Child>,
    /// A file that is locked while a twin of the original is made. No QEMU has a descriptor of it.
    pub turn: OwnedFd,
    /// How many preparations of the guest have failed, which makes clones slower.
    pub unprepared: u64,
    /// Which memory clones write to, once the template has been published.
    pub(crate) working_set: Option<Arc<WorkingSet>>,
    /// Each clone keeps this descriptor open until it ends.
    pub in_use: Option<Arc<OwnedFd>>,
}

impl std::fmt::Debug for VmSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmSnapshot")
            .field("memory", &self.memory)
            .field("qemu", &self.qemu)
            .finish_non_exhaustive()
    }
}

/// Why the state of a VM could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VmSnapshotError {
    /// QEMU could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The memory of a template cannot be made.
    #[error("cannot {action} for the memory of a template")]
    Memory {
        /// What failed: a verb that fits the text, such as `seal a memfd`.
        action: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The guest did not report that it waits to be woken.
    #[error("the guest agent did not reach the point where it waits{ended}")]
    Waiting {
        /// Why QEMU ended, as `: reason`; empty if QEMU has not ended by itself.
        ended: String,
        /// What arrived at the wake port instead.
        source: WakeError,
    },
    /// The guest took longer than this to report that it waits to be woken.
    #[error("the guest agent did not reach the point where it waits within {0:?}")]
    WaitingDeadline(Duration),
    /// QEMU refused to save or restore.
    #[error("QEMU cannot {action} the state of a VM")]
    Qmp {
        /// `save` or `restore`.
        action: &'static str,
        /// What QEMU answered.
        source: QmpError,
    },
    /// The pipe that carries the state of the devices failed.
    #[error("cannot transfer the state of a VM")]
    Stream(#[source] io::Error),
    /// QEMU began to save or restore, and gave up.
    #[error("QEMU did not {action} the state of a VM{ended}")]
    Failed {
        /// `save` or `restore`.
        action: &'static str,
        /// Why QEMU ended, as `: reason`; empty if QEMU has not ended by itself.
        ended: String,
    },
    /// QEMU was killed from outside, by the OOM killer or by a user of the host.
    #[error("QEMU was killed by SIGKILL before the VM ran")]
    Killed,
    /// The state is of another version of QEMU.
    #[error("the state was saved by QEMU {snapshot}, and QEMU {running} cannot read it")]
    Version {
        /// The version that saved the state.
        snapshot: QemuVersion,
        /// The version that was started to restore the state.
        running: QemuVersion,
    },
    /// Another process could change the memory while clones read it.
    #[error("the template's memory is not sealed")]
    NotSealed,
    /// The seccomp filter of QEMU is for another descriptor than that of the memory.
    #[error("QEMU has opened the template's memory under another number")]
    Number,
    /// A disk of the clone cannot be used.
    #[error(transparent)]
    Disk(Box<crate::VmError>),
    /// The channel has a process of its own, whose state is not in the snapshot.
    #[error("a VM with the channel of vhost-device-vsock cannot be cloned")]
    Channel,
}

impl HasKind for VmSnapshotError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Launch(error) => error.kind(),
            Self::WaitingDeadline(_) => ErrorKind::DeadlineExceeded,
            Self::Memory { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ErrorKind::ResourceExhausted
            }
            _ => ErrorKind::Internal,
        }
    }
}

impl VmSnapshot {
    /// Boots a VM until its agent waits, and saves it. Nothing of the VM runs any more when this returns.
    /// `dir` as for [`super::Vm::launch`]. With `disks`, an image and a file system to write to, the guest makes a container once.
    ///
    /// # Errors
    /// The VM does not boot, or QEMU cannot save its state.
    pub async fn make(
        spec: &VmSpec,
        dir: &Path,
        disks: Option<&[File; SLOTS]>,
    ) -> Result<Self, VmSnapshotError> {
        if let crate::ChannelKind::VhostUserVsock { .. } = spec.channel {
            return Err(VmSnapshotError::Channel);
        }
        let memory = memfd::sparse(u64::from(spec.memory_mib) << 20).map_err(failed("make a memfd"))?;
        let passed = memory.try_clone().map_err(failed("duplicate a descriptor"))?;
        let content = disks.map_or(Ok(0), longest).map_err(failed("look at a disk"))?;
        let disks =
            disks.map_or_else(SlotDisks::holes, |disks| SlotDisks::holes_with(disks.each_ref().map(Some)));
        let disks = disks.map_err(|error| VmSnapshotError::Disk(Box::new(error)))?;
        let origin = LaunchOrigin::Template { memory: passed, disks: &disks };
        let mut launched = begin(spec, dir, origin).await?;
        let allowed = launched.allow_to_write(content).map_err(LaunchError::Qemu);
        let made = match allowed {
            Ok(()) => save(spec, &mut launched, &memory).await,
            Err(error) => Err(error.into()),
        };
        let (made, original) = match made {
            Ok(saved) if spec.twins => {
                let original = launched.stand_still(spec, &memory, saved.memory_fd, &disks).await;
                (Ok(saved), original.map_err(|error| error.to_string()))
            }
            made => {
                let exit = launched.end().await;
                (made.map_err(|error| error.with_exit(&exit)), Err("its accelerator has none".to_owned()))
            }
        };
        let Saved { devices, memory_fd, qemu, unprepared } = made?;
        // A memfd can be sealed only when no writable mapping of it is left.
        memfd::seal(&memory).map_err(failed("seal a memfd"))?;
        let (original, original_process) = match original {
            Ok((original, process)) => (Ok(original), Some(process)),
            Err(error) => (Err(error), None),
        };
        let turn = memfd::sparse(0).map_err(failed("make a memfd"))?;
        Ok(Self {
            memory,
            devices,
            memory_fd,
            qemu,
            original,
            original_process,
            turn,
            in_use: None,
            working_set: None,
            unprepared,
        })
    }

    /// A descriptor of the file that is locked while a twin is made, with locks of its own.
    pub(crate) fn turn(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.turn.as_raw_fd()))
    }

    /// # Errors
    /// The memory is not sealed.
    pub(crate) fn check(&self) -> Result<(), VmSnapshotError> {
        if memfd::is_sealed(&self.memory) { Ok(()) } else { Err(VmSnapshotError::NotSealed) }
    }
}

/// The size of the largest file, bytes.
fn longest(files: &[File; SLOTS]) -> io::Result<u64> {
    files.iter().try_fold(0, |longest: u64, file| Ok(longest.max(file.metadata()?.len())))
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> VmSnapshotError {
    move |source| VmSnapshotError::Memory { action, source }
}

/// What is saved of a VM, besides its memory; see [`VmSnapshot`].
struct Saved {
    devices: Vec<u8>,
    memory_fd: i32,
    qemu: QemuVersion,
    unprepared: u64,
}

async fn save(spec: &VmSpec, launched: &mut Launched, memory: &OwnedFd) -> Result<Saved, VmSnapshotError> {
    let port = launched.wake_port();
    let unprepared = match timeout(spec.boot_timeout, wake::waiting(port)).await {
        Ok(Ok(failed)) => failed,
        Ok(Err(source)) => return Err(VmSnapshotError::Waiting { ended: String::new(), source }),
        Err(_) => return Err(VmSnapshotError::WaitingDeadline(spec.boot_timeout)),
    };
    let memory_fd = number_of(launched.pid(), memory)?;
    let qmp = &launched.qmp;
    let refused = |source| VmSnapshotError::Qmp { action: "save", source };
    qmp.execute("stop", json!({})).await.map_err(refused)?;
    qmp.execute("migrate-set-capabilities", capabilities()).await.map_err(refused)?;
    let (reader, writer) = io::pipe().map_err(VmSnapshotError::Stream)?;
    qmp.execute_with_fd("getfd", json!({ "fdname": STATE }), writer.into()).await.map_err(refused)?;
    qmp.execute("migrate", json!({ "uri": format!("fd:{STATE}") })).await.map_err(refused)?;
    let reader = pipe::Receiver::from_owned_fd(reader.into()).map_err(VmSnapshotError::Stream)?;
    let mut devices = Vec::new();
    // One byte more than allowed is read, to detect a stream that is too long.
    let read = timeout(DEADLINE, reader.take(MAX_DEVICES + 1).read_to_end(&mut devices)).await;
    let ended = migration_ended(&mut launched.events).await;
    match read {
        Ok(Ok(length)) if ended && length as u64 <= MAX_DEVICES => {
            Ok(Saved { devices, memory_fd, qemu: launched.qmp.version(), unprepared })
        }
        Ok(Err(error)) => Err(VmSnapshotError::Stream(error)),
        _ => Err(VmSnapshotError::Failed { action: "save", ended: String::new() }),
    }
}

/// Loads the snapshot into a QEMU that waits for it, wakes the agent and lets the guest run.
pub(crate) async fn restore(launched: &mut Launched, snapshot: &VmSnapshot) -> Result<(), VmSnapshotError> {
    let (qmp, running) = (&launched.qmp, launched.qmp.version());
    if running != snapshot.qemu {
        return Err(VmSnapshotError::Version { snapshot: snapshot.qemu, running });
    }
    // The seccomp filter that keeps QEMU from punching holes matches this number.
    if number_of(launched.pid(), &snapshot.memory)? != snapshot.memory_fd {
        return Err(VmSnapshotError::Number);
    }
    // The guest's pages are copied while the devices are loaded. Nothing waits for it.
    let _copied = snapshot.working_set.as_ref().and_then(|set| set.copy_ahead(launched.pid()));
    let refused = |source| VmSnapshotError::Qmp { action: "restore", source };
    let (reader, writer) = io::pipe().map_err(VmSnapshotError::Stream)?;
    qmp.execute_with_fd("getfd", json!({ "fdname": STATE }), reader.into()).await.map_err(refused)?;
    qmp.execute("migrate-set-capabilities", capabilities()).await.map_err(refused)?;
    qmp.execute("migrate-incoming", json!({ "uri": format!("fd:{STATE}") })).await.map_err(refused)?;
    let mut writer = pipe::Sender::from_owned_fd(writer.into()).map_err(VmSnapshotError::Stream)?;
    let written = timeout(DEADLINE, writer.write_all(&snapshot.devices)).await;
    drop(writer);
    if !matches!(written, Ok(Ok(()))) || !migration_ended(&mut launched.events).await {
        return Err(VmSnapshotError::Failed { action: "restore", ended: String::new() });
    }
    proceed(launched).await
}

/// Wakes the agent and lets the guest run.
pub(crate) async fn proceed(launched: &mut Launched) -> Result<(), VmSnapshotError> {
    let refused = |source| VmSnapshotError::Qmp { action: "restore", source };
    let wake = launched.wake();
    wake::wake(launched.wake_port(), wake).await.map_err(VmSnapshotError::Stream)?;
    launched.qmp.execute("cont", json!({})).await.map_err(refused)?;
    Ok(())
}

/// QEMU's name of the pipe.
const STATE: &str = "state";

/// x-ignore-shared: memory in a file is not part of the stream. events: QEMU reports when it has finished.
fn capabilities() -> serde_json::Value {
    let on = |name: &str| json!({ "capability": name, "state": true });
    json!({ "capabilities": [on("x-ignore-shared"), on("events")] })
}

/// Waits for the end of the migration; true if it was completed.
async fn migration_ended(events: &mut broadcast::Receiver<QmpEvent>) -> bool {
    let ended = async {
        loop {
            match events.recv().await {
                Ok(QmpEvent::MigrationEnded { completed }) => return completed,
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return false,
            }
        }
    };
    timeout(DEADLINE, ended).await.unwrap_or(false)
}

/// The number of the descriptor that QEMU has opened for the memory, not the one that it inherited.
fn number_of(pid: u32, memory: &OwnedFd) -> Result<i32, VmSnapshotError> {
    let numbers = numbers_of(pid, memory).map_err(failed("find QEMU's descriptor"))?;
    numbers.into_iter().find(|number| *number != fd::MEMORY).ok_or(VmSnapshotError::Number)
}

/// The numbers of QEMU's descriptors that lead to `file`.
pub(crate) fn numbers_of(pid: u32, file: &impl AsFd) -> io::Result<Vec<i32>> {
    let wanted = File::from(file.as_fd().try_clone_to_owned()?).metadata()?;
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let number: Option<i32> = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A descriptor that was closed meanwhile is a different one.
        let Ok(file) = std::fs::metadata(entry.path()) else { continue };
        if (file.dev(), file.ino()) == (wanted.dev(), wanted.ino()) {
            numbers.extend(number);
        }
    }
    Ok(numbers)
}

impl VmSnapshotError {
    /// Adds why QEMU ended, if the error is a consequence of that.
    pub(crate) fn with_exit(self, exit: &VmExit) -> Self {
        let ended = match exit {
            VmExit::Requested => return self,
            exit if exit.is_sigkill() => return Self::Killed,
            exit => format!(": {exit}"),
        };
        match self {
            Self::Waiting { source, .. } => Self::Waiting { ended, source },
            Self::Failed { action, .. }
            | Self::Qmp { action, source: QmpError::Closed | QmpError::Io(_) } => {
                Self::Failed { action, ended }
            }
            other => other,
        }
    }
}
