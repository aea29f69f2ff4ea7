//! Takes a checkpoint of the source, and copies what the source had written at that moment.
//!
//! Other clients may pause, checkpoint and resume the source at the same time. The runtime serialises these
//! requests, but each pause and each checkpoint exports what the container has written again, and a disk of
//! the snapshotter must not change while it is copied. Both are detected after the copy; then checkpoint and
//! copy are repeated.

use containerd_client::types::v1::Status;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use machinen::{checkpoint::CheckpointManifest, layer::LayerCopy};
use tokio::task::spawn_blocking;

use super::{checkpoint_dir, error::ForkError, steps::Fork, undo::Undo};

/// Attempts in all. A client that interferes with all of them does nothing else.
const TRIES: usize = 5;

impl Fork<'_> {
    /// # Errors
    /// The source cannot be checkpointed, what it has written cannot be copied, or other clients have
    /// interfered with every attempt.
    pub(super) async fn capture(&mut self, layer_copy: &LayerCopy) -> Result<(), ForkError> {
        for _ in 1..TRIES {
            match self.capture_once(layer_copy).await {
                Err(error) if error.is_interference() => {
                    eprintln!(
                        "another client has paused, checkpointed or resumed {}; trying again",
                        self.args.source
                    );
                    self.checkpoint_dir.clear()?;
                }
                captured => return captured,
            }
            self.signals.check()?;
        }
        self.capture_once(layer_copy).await
    }

    async fn capture_once(&mut self, layer_copy: &LayerCopy) -> Result<(), ForkError> {
        if layer_copy.is_live() {
            self.pause().await?;
            self.signals.check()?;
        }
        eprintln!("checkpointing {}", self.args.source);
        let recorded = self.checkpoint().await?.layer;
        self.signals.check()?;
        eprintln!("copying what {} has written", self.args.source);
        let copying = layer_copy.clone();
        let copied = spawn_blocking(move || copying.copy(recorded.as_deref())).await;
        let copied = copied.map_err(ForkError::Worker)?;
        copied.map_err(|source| ForkError::Layer { id: self.args.source.clone(), source })?;
        if layer_copy.is_live() {
            self.end_pause().await?;
        }
        Ok(())
    }

    /// The checkpoint in the directory is complete when this returns.
    async fn checkpoint(&self) -> Result<CheckpointManifest, ForkError> {
        let (id, path) = (self.args.source.clone(), self.checkpoint_dir.path().to_owned());
        match self.containerd.checkpoint(&id, &self.checkpoint_options()).await {
            Ok(()) => Ok(CheckpointManifest::read(&path)?),
            // After the shim has written the directory, containerd 1 copies it, and the container's
            // configuration, to its content store. That fails where another checkpoint has put the same
            // configuration there.
            Err(error) if error.is_already_exists() => {
                let verified = spawn_blocking(move || checkpoint_dir::verified(&path, &id)).await;
                verified.map_err(ForkError::Worker)??.ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The fork gets a copy of every file, so locks on files do not prevent it, and neither do connections.
    fn checkpoint_options(&self) -> CheckpointOptions {
        CheckpointOptions {
            open_tcp: true,
            file_locks: true,
            image_path: self.checkpoint_dir.path().display().to_string(),
            ..Default::default()
        }
    }

    /// Pauses the source, unless another client has.
    async fn pause(&mut self) -> Result<(), ForkError> {
        if self.is_paused().await? {
            return Ok(());
        }
        let paused = self.containerd.pause(&self.args.source).await;
        match self.record(Undo::Pause, paused) {
            Err(error) if !error.is_lost() && self.is_paused().await? => Ok(()),
            paused => paused,
        }
    }

    /// # Errors
    /// The source was resumed before this call, so the copy of its disk is not of one moment.
    async fn end_pause(&mut self) -> Result<(), ForkError> {
        let was_paused = self.is_paused().await?;
        if self.undo.contains(&Undo::Pause) {
            self.resume().await?;
            self.undo.retain(|undo| *undo != Undo::Pause);
        }
        match was_paused {
            true => Ok(()),
            false => Err(ForkError::Resumed { id: self.args.source.clone() }),
        }
    }

    async fn is_paused(&self) -> Result<bool, ForkError> {
        Ok(self.containerd.task(&self.args.source).await?.status() == Status::Paused)
    }
}
