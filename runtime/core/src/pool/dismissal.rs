//! The reasons for which a member ends although no container has taken it.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use machinen_base::{
    fs::{FileError, if_exists},
    pressure::MemoryPressure,
    watch::FileWatch,
};
use machinen_vm::admission::HostMemory;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};

use super::{PoolError, client, slot::PoolSlot};
use crate::config::Config;

/// Why a member ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndReason {
    Signal,
    /// The pool was drained, or the program or its configuration was changed.
    Changed,
    ContainerdGone,
    /// No start has taken the member for long, and it belongs to no containerd.
    Unused,
    /// The host's memory is scarce.
    MemoryScarce,
    /// The watch that reports the other reasons has failed.
    WatchFailed,
}

/// Waits for the first reason from the moment it was created.
#[derive(Debug)]
pub(super) struct Dismissal {
    reason: watch::Receiver<Option<EndReason>>,
    watcher: JoinHandle<()>,
}

impl Dismissal {
    /// `containerd` is the socket of the containerd that the member is for, if there is one.
    pub(super) fn watch(
        slot: &PoolSlot,
        containerd: Option<PathBuf>,
        config: &Config,
    ) -> Result<Self, PoolError> {
        // How long containerd may be absent, and how long a member without one waits.
        let patience = Duration::from_secs(config.pool.containerd_timeout_s);
        let reserve_percent = config.pool.memory_reserve_percent;
        let own = Path::new("/proc/self/exe");
        let changes = changes([own, &config.file], slot).map_err(FileError::at("watch", own))?;
        let mut terminate =
            signal(SignalKind::terminate()).map_err(FileError::at("watch signals of", own))?;
        let pressure = MemoryPressure::watch().inspect_err(|error| {
            tracing::debug!("the scarcity of the host's memory cannot be watched: {error}");
        });
        let (sender, reason) = watch::channel(None);
        let watcher = tokio::spawn(async move {
            let unneeded = async {
                match containerd {
                    Some(socket) => client::gone(&socket, patience).await.map(|()| EndReason::ContainerdGone),
                    None => {
                        tokio::time::sleep(patience).await;
                        Ok(EndReason::Unused)
                    }
                }
            };
            let scarce = async {
                match pressure {
                    Ok(pressure) => scarce(&pressure, reserve_percent).await,
                    Err(_) => std::future::pending().await,
                }
            };
            let reason = tokio::select! {
                _ = terminate.recv() => EndReason::Signal,
                changed = changes.changed() => changed.map_or(EndReason::WatchFailed, |()| EndReason::Changed),
                unneeded = unneeded => unneeded.unwrap_or(EndReason::WatchFailed),
                scarce = scarce => scarce.map_or(EndReason::WatchFailed, |()| EndReason::MemoryScarce),
            };
            sender.send_replace(Some(reason));
        });
        Ok(Self { reason, watcher })
    }

    /// Resolves when there is a reason, and at once from then on.
    pub(super) async fn wait(&self) -> EndReason {
        let mut reason = self.reason.clone();
        let found = reason.wait_for(Option::is_some).await.ok().and_then(|reason| *reason);
        found.unwrap_or(EndReason::WatchFailed)
    }
}

/// Returns when processes of the host wait for memory and less than the reserve is available.
async fn scarce(pressure: &MemoryPressure, reserve_percent: u64) -> io::Result<()> {
    loop {
        pressure.stalled().await?;
        let host = HostMemory::now().map_err(io::Error::other)?;
        if host.available < host.total * reserve_percent / 100 {
            return Ok(());
        }
    }
}

impl Drop for Dismissal {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// A watch that reports when the member's slot loses its name, or the program or its configuration is
/// changed.
fn changes([program, config]: [&Path; 2], slot: &PoolSlot) -> io::Result<FileWatch> {
    let watch = FileWatch::new()?;
    watch.attributes(&slot.open_path())?;
    watch.file(program)?;
    // A missing configuration file is valid.
    if_exists(watch.file(config))?;
    Ok(watch)
}
