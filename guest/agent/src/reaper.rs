//! The one place that waits for children.
//!
//! Inits of containers, processes of the engine and orphans all become children of the agent. The reaper
//! takes each exit from the kernel, once, and passes it to the watcher of that pid. A process may end before
//! its pid is known: while an [`Expectation`] exists, the reaper keeps exits without a watcher.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{errno::Errno, unistd::Pid};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, oneshot},
};

use crate::sys::{self, WaitStatus};

#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    watches: Mutex<Watches>,
    childless: Notify,
}

#[derive(Debug, Default)]
struct Watches {
    watched: HashMap<Pid, oneshot::Sender<WaitStatus>>,
    early: HashMap<Pid, WaitStatus>,
    expectations: usize,
}

/// While this exists, the reaper keeps exits without a watcher.
#[derive(Debug)]
pub(crate) struct Expectation {
    reaper: Reaper,
}

impl WaitStatus {
    /// The exit status as shells and OCI runtimes report it: 128+n for signal n.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Exited(code) => code.into(),
            Self::Signaled(signal) => 128 + u32::from(signal),
        }
    }
}

impl Reaper {
    /// Starts the task that reaps, until the agent ends.
    ///
    /// # Errors
    /// The signal handler cannot be set.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let children = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(children));
        Ok(reaper)
    }

    async fn run(self, mut children: Signal) {
        loop {
            self.reap_all();
            // One signal may stand for many exits.
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// Takes all pending exits. True when no child is left.
    fn reap_all(&self) -> bool {
        loop {
            match sys::reap_any() {
                Ok(Some((pid, status))) => self.ended(pid, status),
                Err(Errno::EINTR) => {}
                Ok(None) => return false,
                // ECHILD is the only other error that waitpid(2) has.
                Err(_) => {
                    self.shared.childless.notify_waiters();
                    return true;
                }
            }
        }
    }

    fn ended(&self, pid: Pid, status: WaitStatus) {
        let mut watches = self.lock();
        if let Some(watcher) = watches.watched.remove(&pid) {
            // The watcher may have dropped its receiver.
            let _ = watcher.send(status);
        } else if watches.expectations > 0 {
            watches.early.insert(pid, status);
        }
    }

    /// Keeps all exits until the expectation is dropped. To be called before the process can exist.
    pub(crate) fn expect(&self) -> Expectation {
        self.lock().expectations += 1;
        Expectation { reaper: self.clone() }
    }

    /// Signals a watched process. False when it was reaped: its pid may belong to another process.
    ///
    /// # Errors
    /// Those of kill(2).
    pub(crate) fn signal(&self, pid: Pid, signal: i32) -> Result<bool, Errno> {
        // The agent has one thread: no process is reaped while this runs.
        if !self.lock().watched.contains_key(&pid) {
            return Ok(false);
        }
        sys::kill_raw(pid, signal).map(|()| true)
    }

    /// Opens a watched process. None when it was reaped: its pid may belong to another process.
    ///
    /// # Errors
    /// Those of pidfd_open(2).
    pub(crate) fn open(&self, pid: Pid) -> Result<Option<OwnedFd>, Errno> {
        // As for signals: no process is reaped while this runs.
        if !self.lock().watched.contains_key(&pid) {
            return Ok(None);
        }
        sys::open_process(pid).map(Some)
    }

    /// Resolves when the agent has no child left.
    pub(crate) async fn childless(&self) {
        let childless = self.shared.childless.notified();
        if !self.reap_all() {
            childless.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watches> {
        self.shared.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expectation {
    /// The exit of a child, which may have ended already.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<WaitStatus> {
        let (sender, exit) = oneshot::channel();
        let mut watches = self.reaper.lock();
        match watches.early.remove(&pid) {
            // The receiver exists: this function returns it.
            Some(early) => _ = sender.send(early),
            None => _ = watches.watched.insert(pid, sender),
        }
        exit
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut watches = self.reaper.lock();
        watches.expectations -= 1;
        if watches.expectations == 0 {
            watches.early.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: WaitStatus = WaitStatus::Exited(3);

    #[tokio::test]
    async fn an_exit_before_the_watch_is_kept_while_expected() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(42), STATUS);
        assert_eq!(expectation.watch(Pid::from_raw(42)).await, Ok(STATUS));
    }

    #[tokio::test]
    async fn an_exit_after_the_watch_arrives() {
        let reaper = Reaper::default();
        let watch = reaper.expect().watch(Pid::from_raw(42));
        reaper.ended(Pid::from_raw(42), STATUS);
        assert_eq!(watch.await, Ok(STATUS));
    }

    #[test]
    fn orphans_leave_nothing_behind() {
        let reaper = Reaper::default();
        reaper.ended(Pid::from_raw(7), STATUS);
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(8), STATUS);
        drop(expectation);
        assert!(reaper.lock().early.is_empty());
    }

    #[test]
    fn a_signal_is_128_plus_its_number() {
        assert_eq!(WaitStatus::Signaled(9).code(), 137);
        assert_eq!(WaitStatus::Exited(255).code(), 255);
    }
}
