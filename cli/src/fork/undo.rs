//! What a fork has made, and how it is undone.
//!
//! A request whose answer was lost, because containerd was restarted, may have been carried out or not. Its
//! result is undone too, but only if it belongs to this fork: another client may have made something of the
//! same name.

use containerd_client::types::v1::Status;
use machinen::error::chain;

use super::{error::ForkError, serving::serving, steps::Fork};

/// The label of NEW's snapshot, whose value is the lease of the fork that has made it.
pub(super) const LABEL: &str = "io.machinen.fork";

/// What is undone if a later step fails.
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
    /// Records what a request has made, or may have made.
    pub(super) fn record<T>(&mut self, undo: Undo, answer: Result<T, ForkError>) -> Result<T, ForkError> {
        if answer.as_ref().err().is_none_or(ForkError::is_lost) {
            self.undo.push(undo);
        }
        answer
    }

    /// Undoes everything in the opposite order. Failures are only printed, because the fork's error is the
    /// first failure.
    pub(super) async fn undo_all(&mut self, failure: &ForkError) {
        let serves = match failure.is_lost() {
            true => serving(&self.containerd).await,
            false => Ok(()),
        };
        if let Err(error) = serves {
            report(&error);
        }
        while let Some(undo) = self.undo.pop() {
            match self.undo_step(undo).await {
                // Another client has removed it already.
                Err(error) if error.is_not_found() => {}
                Err(error) => report(&error),
                Ok(()) => {}
            }
        }
    }

    async fn undo_step(&mut self, undo: Undo) -> Result<(), ForkError> {
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

    /// Resumes the source, unless another client has done so.
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
    eprintln!("machinen: undoing a failed fork: {}", chain(error));
}
