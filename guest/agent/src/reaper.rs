//! The one place that waits for children.
//!
//! Inits of containers, processes of the engine and orphans all become children of the agent. Each exit is
//! taken from the kernel here, once, and given to whoever watches that pid. A process may end before its pid is
//! known: while somebody holds an [`Expectation`], exits that nobody watches are kept for them.

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use nix::{errno::Errno, unistd::Pid};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, oneshot},
};

use crate::sys::{self, WaitStatus};

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: WaitStatus,
    pub(crate) at: SystemTime,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<Table>,
    childless: Notify,
}

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<Pid, oneshot::Sender<Exit>>,
    early: HashMap<Pid, Exit>,
    expectations: usize,
}

/// While this lives, no exit is forgotten.
#[derive(Debug)]
pub(crate) struct Expectation {
    reaper: Reaper,
}

impl Exit {
    /// The exit status as shells and the OCI world write it: 128+n for signal n.
    pub(crate) fn code(self) -> u32 {
        match self.status {
            WaitStatus::Exited(code) => code.into(),
            WaitStatus::Signaled(signal) => 128 + u32::from(signal),
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

    /// Takes all exits that there are. True when no child is left.
    fn reap_all(&self) -> bool {
        loop {
            match sys::reap_any() {
                Ok(Some((pid, status))) => self.ended(pid, Exit { status, at: SystemTime::now() }),
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

    fn ended(&self, pid: Pid, exit: Exit) {
        let mut table = self.lock();
        if let Some(watcher) = table.watched.remove(&pid) {
            // Whoever watched may have lost interest.
            let _ = watcher.send(exit);
        } else if table.expectations > 0 {
            table.early.insert(pid, exit);
        }
    }

    /// Keeps all exits until the expectation is dropped. To be taken before the process can exist.
    pub(crate) fn expect(&self) -> Expectation {
        self.lock().expectations += 1;
        Expectation { reaper: self.clone() }
    }

    /// Signals a watched process. False when it has been reaped, so that its pid may be another's by now.
    ///
    /// # Errors
    /// Those of kill(2).
    pub(crate) fn signal(&self, pid: Pid, signal: i32) -> Result<bool, Errno> {
        // Nothing is reaped while this runs: there is one thread.
        if !self.lock().watched.contains_key(&pid) {
            return Ok(false);
        }
        sys::kill_raw(pid, signal).map(|()| true)
    }

    /// A handle on a watched process. None when it has been reaped, so that its pid may be another's by now.
    ///
    /// # Errors
    /// Those of pidfd_open(2).
    pub(crate) fn hold(&self, pid: Pid) -> Result<Option<OwnedFd>, Errno> {
        // As for signals: nothing is reaped meanwhile.
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

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expectation {
    /// The exit of a child, whether it has ended already or not.
    pub(crate) fn watch(&self, pid: Pid) -> oneshot::Receiver<Exit> {
        let (sender, exit) = oneshot::channel();
        let mut table = self.reaper.lock();
        match table.early.remove(&pid) {
            // The receiver is right here.
            Some(early) => _ = sender.send(early),
            None => _ = table.watched.insert(pid, sender),
        }
        exit
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.early.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit() -> Exit {
        Exit { status: WaitStatus::Exited(3), at: SystemTime::UNIX_EPOCH }
    }

    #[tokio::test]
    async fn an_exit_before_the_watch_is_kept_while_expected() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(42), exit());
        assert_eq!(expectation.watch(Pid::from_raw(42)).await, Ok(exit()));
    }

    #[tokio::test]
    async fn an_exit_after_the_watch_arrives() {
        let reaper = Reaper::default();
        let watch = reaper.expect().watch(Pid::from_raw(42));
        reaper.ended(Pid::from_raw(42), exit());
        assert_eq!(watch.await, Ok(exit()));
    }

    #[test]
    fn orphans_leave_nothing_behind() {
        let reaper = Reaper::default();
        reaper.ended(Pid::from_raw(7), exit());
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(8), exit());
        drop(expectation);
        assert!(reaper.lock().early.is_empty());
    }

    #[test]
    fn a_signal_is_128_plus_its_number() {
        let at = SystemTime::UNIX_EPOCH;
        assert_eq!(Exit { status: WaitStatus::Signaled(9), at }.code(), 137);
        assert_eq!(Exit { status: WaitStatus::Exited(255), at }.code(), 255);
    }
}
