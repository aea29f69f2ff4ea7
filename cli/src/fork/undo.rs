//! What a fork has made, and how it is taken back.
//!
//! A request whose answer was lost, because containerd was restarted, may have been carried out or not. What it was to make
//! is taken back too, but only if it is this fork's: another client may have made something of the same name.

use containerd_client::types::v1::Status;
use machinen::error::chain;

use super::{error::ForkError, serving::serving, steps::Fork};

/// On the snapshot of NEW: the lease of the fork that has made it.
pub(super) const LABEL: &str = "io.machinen.fork";

/// What is taken back if a later step fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Undo {
    CheckpointDir,
    Lease,
    Snapshot,
    Container,
    Pause,
    Task,
}

impl Fork<'_> {
    /// Notes what a request has made, or may have made.
    pub(super) fn note<T>(&mut self, undo: Undo, answer: Result<T, ForkError>) -> Result<T, ForkError> {
        if answer.as_ref().err().is_none_or(ForkError::is_lost) {
            self.undo.push(undo);
        }
        answer
    }

    /// In the opposite order. Failures are printed: the first one is the fork's.
    pub(super) async fn take_back(&mut self, failure: &ForkError) {
        let serves = match failure.is_lost() {
            true => serving(&self.containerd).await,
            false => Ok(()),
        };
        if let Err(error) = serves {
            report(&error);
        }
        while let Some(undo) = self.undo.pop() {
            match self.remove(undo).await {
                // Another client was faster.
                Err(error) if error.is_not_found() => {}
                Err(error) => report(&error),
                Ok(()) => {}
            }
        }
    }

    async fn remove(&mut self, undo: Undo) -> Result<(), ForkError> {
        let new = self.args.new.as_str();
        match undo {
            Undo::Task => self.containerd.end_task(new).await,
            Undo::Pause => self.resume().await,
            Undo::Container if !self.owns_container().await? => Ok(()),
            Undo::Container => self.containerd.delete_container(new).await,
            Undo::Snapshot if !self.owns_snapshot().await? => Ok(()),
            Undo::Snapshot => self.containerd.remove_snapshot(&self.source.container.snapshotter, new).await,
            Undo::Lease => self.containerd.give_back_lease(&self.lease).await,
            Undo::CheckpointDir => self.checkpoint_dir.remove(),
        }
    }

    /// Lets the source continue, unless another client has done that.
    pub(super) async fn resume(&self) -> Result<(), ForkError> {
        let source = &self.args.source;
        let Err(error) = self.containerd.resume(source).await else { return Ok(()) };
        match self.containerd.task(source).await {
            Ok(task) if task.status() == Status::Running => Ok(()),
            _ => Err(error),
        }
    }

    async fn owns_container(&self) -> Result<bool, ForkError> {
        let container = self.containerd.container(&self.args.new).await?;
        let spec = container.spec.map(|spec| spec.value).unwrap_or_default();
        Ok(container.snapshot_key == self.args.new
            && [&self.spec.restoring, &self.spec.lasting].into_iter().any(|ours| *ours == spec))
    }

    async fn owns_snapshot(&self) -> Result<bool, ForkError> {
        let snapshot = self.containerd.snapshot(&self.source.container.snapshotter, &self.args.new).await?;
        Ok(snapshot.labels.get(LABEL) == Some(&self.lease))
    }
}

fn report(error: &ForkError) {
    eprintln!("machinen: taking back a fork that failed: {}", chain(error));
}
