//! The one task that owns a VM: it carries out requests, records QEMU's events, ends the VM and cleans up.

use std::{
    future::Future,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use machinen_base::process::{Child, ProcessExit, ReservedUser};
use nix::sys::signal::Signal;
use tokio::{
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::agent;
use crate::{
    VmError,
    boot::VmBootError,
    bounded_log::BoundedLog,
    channel::VmChannel,
    exit::{ExitEvidence, VmExit, classify},
    qemu::{
        hotplug::{AttachedDisks, DiskAddress, DiskSpec},
        launch::CONSOLE_LOG,
        qmp::{Qmp, QmpEvent},
        slots::SlotDisks,
    },
};

/// How long QEMU's sockets and pipes are read after it has ended. They end with QEMU, unless a descriptor
/// leaked.
const DRAIN: Duration = Duration::from_secs(2);

/// A request of a handle to the driver.
#[derive(Debug)]
pub(super) enum VmRequest {
    Attach(DiskSpec, oneshot::Sender<Result<DiskAddress, VmError>>),
    Detach(DiskAddress, oneshot::Sender<Result<(), VmError>>),
    CloseSlots(oneshot::Sender<Result<(), VmError>>),
}

/// Whether and how the VM is to end.
#[derive(Debug, Clone, Copy)]
pub(super) enum StopRequest {
    No,
    Within(Duration),
    Now,
}

/// All resources of a running VM.
#[derive(Debug)]
pub(super) struct RunningVm {
    pub(super) qemu: Child,
    pub(super) channel: Arc<VmChannel>,
    /// Kept open, because the guest would notice its end.
    pub(super) wake: Option<UnixStream>,
    pub(super) console: QemuOutput,
    pub(super) stderr: QemuOutput,
    pub(super) dir: VmDir,
    pub(super) keep_console: bool,
    /// Open while this clone uses its template; the template's holder notices when it is closed.
    pub(super) in_use: Option<Arc<OwnedFd>>,
    /// The user that QEMU runs as.
    pub(super) user: ReservedUser,
}

/// One of QEMU's outputs, and the task that reads it.
#[derive(Debug)]
pub(super) struct QemuOutput {
    pub(super) bounded_log: BoundedLog,
    pub(super) reader: JoinHandle<std::io::Result<()>>,
}

/// The VM's directory.
#[derive(Debug)]
pub(super) struct VmDir {
    pub(super) path: PathBuf,
    /// The directory was made for this VM.
    pub(super) made: bool,
}

/// The channels that the driver listens on.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) events: broadcast::Receiver<QmpEvent>,
    pub(super) requests: mpsc::Receiver<VmRequest>,
    pub(super) stop: watch::Receiver<StopRequest>,
    pub(super) agent: watch::Receiver<Option<Result<agent::Client, Arc<VmBootError>>>>,
    pub(super) slots: Slots,
}

/// The disks that a VM has from the start.
#[derive(Debug)]
pub(super) enum Slots {
    /// The VM has booted.
    Absent,
    /// The VM is a clone, with these disks in its template's slots.
    Present(SlotDisks),
}

/// Runs until the VM has ended and nothing is left of it.
pub(super) async fn drive(running: RunningVm, qmp: Qmp, inputs: Inputs) -> VmExit {
    let Inputs { mut events, requests, mut stop, agent, slots } = inputs;
    let mut evidence = ExitEvidence::default();
    let disks = AttachedDisks::new(qmp, events.resubscribe(), running.qemu.limits());
    let mut work = pin!(serve(requests, disks, slots));
    let (mut working, mut listening) = (true, true);
    let mut exited = pin!(running.qemu.exited());
    let mut ending: Option<Pin<Box<dyn Future<Output = ()> + Send>>> = None;
    let exit = loop {
        let request = tokio::select! {
            exit = &mut exited => break exit,
            event = events.recv(), if listening => {
                listening = !matches!(event, Err(broadcast::error::RecvError::Closed));
                record(&mut evidence, event);
                continue;
            }
            request = stop.changed() => match request {
                Ok(()) => *stop.borrow_and_update(),
                Err(_) => StopRequest::Now,
            },
            served = &mut work, if working => {
                working = false;
                if let Err(error) = served {
                    // Where QEMU has ended by itself this is the consequence, and the reason is QEMU's own.
                    tracing::error!("the VM is killed: {}", machinen_base::error::chain(&*error));
                    kill(&running.qemu);
                    break exited.await;
                }
                // No handle is left.
                StopRequest::Now
            }
            () = async { ending.as_mut().expect("checked").await }, if ending.is_some() => StopRequest::Now,
        };
        evidence.requested = true;
        match request {
            StopRequest::No => {}
            StopRequest::Within(grace) => ending = Some(Box::pin(power_off(agent.borrow().clone(), grace))),
            StopRequest::Now => {
                kill(&running.qemu);
                break exited.await;
            }
        }
    };
    if listening {
        record_last_events(&mut evidence, &mut events).await;
    }
    running.finish(&evidence, exit).await
}

/// Records QEMU's last events, which may not have been read yet when QEMU has ended.
pub(super) async fn record_last_events(
    evidence: &mut ExitEvidence,
    events: &mut broadcast::Receiver<QmpEvent>,
) {
    let drained = async {
        loop {
            let event = events.recv().await;
            if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                return;
            }
            record(evidence, event);
        }
    };
    // QEMU's end of the monitor is closed by now.
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        tracing::warn!("QEMU has ended but its monitor has not");
    }
}

impl RunningVm {
    /// Cleans up after QEMU has ended, and returns why the VM ended.
    pub(super) async fn finish(self, evidence: &ExitEvidence, exit: ProcessExit) -> VmExit {
        let Self { qemu, channel, wake, console, stderr, dir, keep_console, in_use, user } = self;
        drop((qemu, wake, in_use, user));
        let console = console.end("console").await;
        let stderr = stderr.end("stderr").await;
        let reason = classify(evidence, exit, console.excerpt(), stderr.excerpt());
        if let Err(error) = channel.close().await {
            tracing::warn!("{}", machinen_base::error::chain(&error));
        }
        dir.clean(keep_console || reason != VmExit::Requested);
        reason
    }
}

impl QemuOutput {
    async fn end(self, name: &str) -> BoundedLog {
        match tokio::time::timeout(DRAIN, self.reader).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!("cannot log a VM's {name}: {error}"),
            Ok(Err(_)) | Err(_) => tracing::warn!("a VM's {name} has not been read to its end"),
        }
        self.bounded_log
    }
}

impl VmDir {
    pub(super) fn clean(&self, keep_console: bool) {
        let log = self.path.join(CONSOLE_LOG);
        // An empty log is of no use.
        let empty = log.metadata().is_ok_and(|meta| meta.len() == 0);
        if (empty || !keep_console)
            && let Err(error) = std::fs::remove_file(&log)
        {
            tracing::warn!(path = %log.display(), "cannot remove a console log: {error}");
        }
        // A directory that is not empty stays: it holds the console log, or files of the caller.
        if self.made
            && let Err(error) = std::fs::remove_dir(&self.path)
        {
            tracing::debug!(path = %self.path.display(), "keeping the directory of a VM: {error}");
        }
    }
}

fn record(evidence: &mut ExitEvidence, event: Result<QmpEvent, broadcast::error::RecvError>) {
    match event {
        Ok(QmpEvent::Shutdown { reason }) => evidence.shutdown = Some(reason),
        Ok(QmpEvent::GuestPanicked) => evidence.panicked = true,
        Ok(_) => {}
        Err(error) => tracing::debug!("QEMU's events: {error}"),
    }
}

/// Ends when the last handle is gone, or when the VM must end because of its disks.
async fn serve(
    mut requests: mpsc::Receiver<VmRequest>,
    mut disks: AttachedDisks,
    slots: Slots,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if let Slots::Present(disks_in_slots) = slots {
        disks.take_over(disks_in_slots)?;
    }
    loop {
        let request = tokio::select! {
            request = requests.recv() => request,
            () = disks.until_look() => {
                disks.look().await?;
                continue;
            }
        };
        // The caller may have stopped waiting for the answer.
        match request {
            None => return Ok(()),
            Some(VmRequest::Attach(disk, answer)) => {
                let answered = answer.send(disks.attach(disk).await);
                // Without the address no caller could detach the disk.
                if let Err(Ok(address)) = answered
                    && let Err(error) = disks.detach(address).await
                {
                    tracing::warn!("{}", machinen_base::error::chain(&error));
                }
            }
            Some(VmRequest::CloseSlots(answer)) => drop(answer.send(disks.close_slots().await)),
            Some(VmRequest::Detach(address, answer)) => drop(answer.send(disks.detach(address).await)),
        }
    }
}

fn kill(qemu: &Child) {
    if let Err(error) = qemu.signal(Signal::SIGKILL) {
        tracing::error!("cannot kill a VM: {}", machinen_base::error::chain(&error));
    }
}

/// Asks the guest to shut down, and returns when waiting longer is of no use.
async fn power_off(agent: Option<Result<agent::Client, Arc<VmBootError>>>, grace: Duration) {
    let Some(Ok(agent)) = agent else { return };
    let asked = async {
        match agent.shutdown().await {
            // The disks are unmounted and synced. Waiting for the guest's kernel to power off would only be
            // slower than a kill.
            Ok(()) => {}
            // The VM ended before the answer arrived.
            Err(agent::AgentError::Closed) => std::future::pending().await,
            Err(error) => tracing::warn!("{}", machinen_base::error::chain(&error)),
        }
    };
    if tokio::time::timeout(grace, asked).await.is_err() {
        tracing::warn!("the guest did not power off within {grace:?}");
    }
}
