//! Pausing a container: the guest's kernel freezes its processes, while the agent and the pod's other
//! containers continue. The vCPUs are never stopped, because clients send further requests for a paused
//! container.

use std::sync::Arc;

use super::{Container, ContainerId, Pod, PodError, PodEvent, PodRequest, Transition, frozen::Frozen};

impl Pod {
    /// Freezes every process of a container. None of them runs when this returns.
    ///
    /// # Errors
    /// The container does not exist, is not running or is paused already, or cannot be frozen. It continues
    /// to run then.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), PodError> {
        let container = self.container(id)?;
        // Runs in a task of its own: a caller that goes away must not leave a frozen container that is
        // reported as running.
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.freeze(&container).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn freeze(&self, container: &Container) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let _none_starting = container.freezing.write().await;
        let refused = |source| PodError::state(PodRequest::Pause, id, source);
        container.check(PodRequest::Pause)?;
        let agent = self.agent(id).await?;
        let frozen = Frozen::freeze(&agent, id).await?;
        if let Err(error) = self.while_frozen(container).await {
            frozen.thaw().await;
            return Err(error);
        }
        frozen.leave_frozen();
        container.init.advance(Transition::Pause).map_err(refused)?;
        self.emit(PodEvent::Paused { id: container.id.clone() });
        Ok(())
    }

    /// Does the work that has to happen after a container is frozen and before it is reported as paused.
    ///
    /// This is the only place for such work: the container's files do not change meanwhile, its agent
    /// answers, and an error undoes the pause.
    pub(super) async fn while_frozen(&self, container: &Container) -> Result<(), PodError> {
        // Clients that pause a container read its snapshot next.
        self.export_layer(&container.id).await
    }

    /// Resumes a paused container.
    ///
    /// # Errors
    /// The container does not exist or is not paused, or the agent does not answer.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), PodError> {
        let container = self.container(id)?;
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.thaw(&container).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn thaw(&self, container: &Arc<Container>) -> Result<(), PodError> {
        let id = container.id.as_str();
        let _ordered = container.init.transitions.lock().await;
        let refused = |source| PodError::state(PodRequest::Resume, id, source);
        container.check(PodRequest::Resume)?;
        let agent = self.agent(id).await?;
        if let Some(network) = &container.network {
            // A checkpoint may have its connections, which are this container's again.
            network.release().await.map_err(PodError::Network)?;
        }
        agent.resume_container(id).await.map_err(|source| PodError::guest("resume", id, source))?;
        container.init.advance(Transition::Resume).map_err(refused)?;
        self.emit(PodEvent::Resumed { id: container.id.clone() });
        Ok(())
    }
}
