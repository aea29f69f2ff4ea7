//! Why a member ends although no container has taken it.

use std::{
    env, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};

use super::{PoolError, client, file, slot::Slot};
use crate::{config, watch::Watch};

/// The reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Signal,
    /// The pool was drained, or the program or its configuration is not what it was.
    Changed,
    ContainerdGone,
    /// What tells of the others is lost.
    Blind,
}

/// Notices the first reason, at any time from when it was made on.
#[derive(Debug)]
pub(super) struct Dismissal {
    reason: watch::Receiver<Option<Reason>>,
    watcher: JoinHandle<()>,
}

impl Dismissal {
    /// `containerd` is the socket of the containerd that the member is for, if it is known, and how long that may be absent.
    pub(super) fn watch(slot: &Slot, containerd: Option<(PathBuf, Duration)>) -> Result<Self, PoolError> {
        let own = Path::new("/proc/self/exe");
        let changes = changes(own, slot).map_err(file("watch", own))?;
        let mut terminate = signal(SignalKind::terminate()).map_err(file("watch signals of", own))?;
        let (sender, reason) = watch::channel(None);
        let watcher = tokio::spawn(async move {
            let gone = async {
                match containerd {
                    Some((socket, patience)) => client::gone(&socket, patience).await,
                    None => std::future::pending().await,
                }
            };
            let reason = tokio::select! {
                _ = terminate.recv() => Reason::Signal,
                changed = changes.changed() => changed.map_or(Reason::Blind, |()| Reason::Changed),
                gone = gone => gone.map_or(Reason::Blind, |()| Reason::ContainerdGone),
            };
            sender.send_replace(Some(reason));
        });
        Ok(Self { reason, watcher })
    }

    /// Resolves when there is a reason, and at once after that.
    pub(super) async fn comes(&self) -> Reason {
        let mut reason = self.reason.clone();
        let found = reason.wait_for(Option::is_some).await.ok().and_then(|reason| *reason);
        found.unwrap_or(Reason::Blind)
    }
}

impl Drop for Dismissal {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// Changes when the member's slot loses its name, or the program or its configuration is not what it was.
fn changes(program: &Path, slot: &Slot) -> io::Result<Watch> {
    let watch = Watch::new()?;
    watch.attributes(&slot.open_path())?;
    watch.file(program)?;
    let config = env::var_os("MACHINEN_CONFIG").map_or_else(|| config::DEFAULT_PATH.into(), PathBuf::from);
    match watch.file(&config) {
        // No configuration is a configuration.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(watch),
    }
}
