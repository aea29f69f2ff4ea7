//! Pausing a container: its processes are frozen by the guest's kernel, while the guest itself, its agent and the
//! pod's other containers go on. The vCPUs are never stopped: whoever pauses asks the guest for more then.

use std::sync::Arc;

use super::{Container, Event, Pod, PodError, Transition};

impl Pod {
    /// Freezes every process of a container; none of them runs when this returns.
    ///
    /// # Errors
    /// It does not exist, does not run or is paused already, or cannot be frozen; it runs on then.
    pub async fn pause(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        // In a task of its own: a caller that goes away must not leave a frozen container that is said to run.
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.freeze(&container).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn freeze(&self, container: &Container) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let _none_starting = container.freezing.write().await;
        let refused = |source| PodError::state("pause", id, source);
        container.state().after(Transition::Pause).map_err(refused)?;
        let agent = self.agent(id).await?;
        agent.pause_container(id).await.map_err(|source| PodError::guest("pause", id, source))?;
        if let Err(error) = self.while_frozen(container).await {
            if let Err(thaw) = agent.resume_container(id).await {
                tracing::warn!(id, "cannot resume after a pause that failed: {}", crate::error::chain(&thaw));
            }
            return Err(error);
        }
        container.init.advance(Transition::Pause).map_err(refused)?;
        self.emit(Event::Paused { id: id.to_owned() });
        Ok(())
    }

    /// What has to happen between the freezing of a container and its being called paused.
    ///
    /// The one place for it: nothing of the container writes meanwhile, its agent answers, and an error undoes the pause.
    pub(super) async fn while_frozen(&self, container: &Container) -> Result<(), PodError> {
        // Whoever pauses a container reads its snapshot next.
        self.export_layer(&container.id).await
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// It does not exist or is not paused, or the agent does not answer.
    pub async fn resume(&self, id: &str) -> Result<(), PodError> {
        let container = self.container(id)?;
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.thaw(&container).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn thaw(&self, container: &Arc<Container>) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let refused = |source| PodError::state("resume", id, source);
        container.state().after(Transition::Resume).map_err(refused)?;
        let agent = self.agent(id).await?;
        agent.resume_container(id).await.map_err(|source| PodError::guest("resume", id, source))?;
        container.init.advance(Transition::Resume).map_err(refused)?;
        self.emit(Event::Resumed { id: id.to_owned() });
        Ok(())
    }
}
