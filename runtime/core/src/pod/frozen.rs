//! A container whose processes are frozen in the guest until it is clear how the container continues.
//!
//! ```text
//!   freeze ──> Frozen ── thaw ──────────> the processes run again
//!                  ├──── leave_frozen ──> paused by a client, or killed while it was frozen
//!                  └──── dropped ───────> thawed in the background, since the request ended without a decision
//! ```

use machinen_base::error::chain;
use machinen_vm::agent;

use super::PodError;

/// A frozen container.
#[derive(Debug)]
#[must_use = "dropping it thaws the container"]
pub(super) struct Frozen {
    /// None: it is decided how the container continues.
    thaw: Option<Thaw>,
}

#[derive(Debug)]
struct Thaw {
    agent: agent::Client,
    id: String,
}

impl Frozen {
    /// Freezes the container's processes. None of them runs when this returns.
    ///
    /// # Errors
    /// The guest cannot freeze the processes. They run then.
    pub(super) async fn freeze(agent: &agent::Client, id: &str) -> Result<Self, PodError> {
        agent.pause_container(id).await.map_err(|source| PodError::guest("pause", id, source))?;
        Ok(Self { thaw: Some(Thaw { agent: agent.clone(), id: id.to_owned() }) })
    }

    /// Has the processes run again. A failure is logged: the request whose failure made this necessary reports
    /// its own error.
    pub(super) async fn thaw(mut self) {
        if let Some(thaw) = self.thaw.take() {
            thaw.run().await;
        }
    }

    /// Leaves the processes frozen: the container is reported as paused, or has been killed.
    pub(super) fn leave_frozen(mut self) {
        self.thaw = None;
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let Some(thaw) = self.thaw.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(thaw.run())),
            Err(_) => tracing::error!(id = thaw.id, "a container stays frozen: the event loop has ended"),
        }
    }
}

impl Thaw {
    async fn run(self) {
        if let Err(error) = self.agent.resume_container(&self.id).await {
            tracing::error!(id = self.id, "cannot resume a container that was frozen: {}", chain(&error));
        }
    }
}
