//! A pod: one VM and the containers in it. A single container is a pod of one.
//!
//! ```text
//!   create ---> config, bundle, rootfs plan              (pure: refusals cost nothing)
//!           \-> VM boots | base disk found or built | writable disk made | anchor started      (all at once)
//!            -> disks attached as they become ready -> agent answers -> streams -> CreateContainer
//!   start  ---> StartContainer; a watcher waits for the end since create
//!   end    ---> output drained -> Stopped, event -> last container: VM powers off
//!   delete ---> the entry goes, when nothing is left in the guest
//! ```
//! Whoever owns a [`Pod`] owns its VM: the shim, or the command line's monitor.

pub mod anchor;
mod container;
mod create;
mod error;
pub mod event;
mod exit;
mod phases;
pub mod rootfs;
pub mod state;
pub mod stdio;
mod vm_spec;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use tokio::sync::mpsc;

pub use container::Container;
pub use create::Create;
pub use error::PodError;
use event::Event;
use state::{Exit, State, StateError, Transition};

use crate::{agent, config::Config, vm::Vm};

/// One VM and the containers in it; cheap to clone, all clones are the same pod.
#[derive(Debug, Clone)]
pub struct Pod {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    /// Names the VM in logs and process lists.
    name: String,
    /// Where the pod keeps its sockets and the console log; made by the first create, removed with the VM.
    dir: PathBuf,
    events: mpsc::UnboundedSender<Event>,
    /// Held by create and by the end of the last container, so that the VM is booted and ended once.
    vm: tokio::sync::Mutex<Option<Vm>>,
    containers: Mutex<HashMap<String, Entry>>,
}

#[derive(Debug, Clone)]
enum Entry {
    /// The id is taken while its container is being created.
    Creating,
    Ready(Arc<Container>),
}

impl Pod {
    /// An empty pod; its VM boots with its first container. Events are sent in the order in which they happen.
    pub fn new(config: Config, name: String, dir: PathBuf, events: mpsc::UnboundedSender<Event>) -> Self {
        let shared = Shared {
            config,
            name,
            dir,
            events,
            vm: tokio::sync::Mutex::default(),
            containers: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Lets the user's process run; returns the pid of the container's anchor.
    ///
    /// # Errors
    /// The container does not exist or was started before, or its command cannot be executed.
    pub async fn start(&self, id: &str) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let _ordered = container.transitions.lock().await;
        container.state().after(Transition::Start).map_err(|source| PodError::state("start", id, source))?;
        self.agent(id)
            .await?
            .start_container(id)
            .await
            .map_err(|source| PodError::guest("start", id, source))?;
        container.advance(Transition::Start).map_err(|source| PodError::state("start", id, source))?;
        self.emit(Event::Started { id: id.to_owned(), pid: container.pid });
        Ok(container.pid)
    }

    /// Sends `signal` to the container's init, or to all of its processes.
    ///
    /// # Errors
    /// The container does not exist or has stopped, or the agent does not answer.
    pub async fn kill(&self, id: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let container = self.container(id)?;
        if let State::Stopped(_) = container.state() {
            return Err(PodError::state("signal", id, StateError::AlreadyStopped));
        }
        let agent = self.agent(id).await?;
        agent
            .signal_process(id, "", signal, all)
            .await
            .map_err(|source| PodError::guest("signal", id, source))
    }

    /// Forgets a stopped container, or ends one that was never started. Nothing of it is left when this returns.
    ///
    /// # Errors
    /// The container does not exist or is running.
    pub async fn delete(&self, id: &str) -> Result<(u32, Exit), PodError> {
        let container = self.container(id)?;
        if container.state() == State::Created {
            match self.kill(id, libc::SIGKILL as u32, false).await {
                Ok(()) | Err(PodError::State { .. } | PodError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
            container.exited().await;
        }
        container
            .state()
            .after(Transition::Delete)
            .map_err(|source| PodError::state("delete", id, source))?;
        let exit = container.exited().await;
        container.gone_from_guest().await;
        if self.containers().remove(id).is_some() {
            self.emit(Event::Deleted { id: id.to_owned(), pid: container.pid, exit });
        }
        Ok((container.pid, exit))
    }

    /// The container's stdin ends when everything that was written to its fifo so far has been read.
    ///
    /// # Errors
    /// The container does not exist.
    pub fn close_stdin(&self, id: &str) -> Result<(), PodError> {
        if let Some(stdin) = &self.container(id)?.stdin {
            stdin.close();
        }
        Ok(())
    }

    /// Ends the VM and all containers in it, as the owner is ending; each container reports its exit first.
    pub async fn end(&self) {
        let vm = self.shared.vm.lock().await.take();
        if let Some(vm) = vm {
            vm.kill().await;
        }
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for entry in containers {
            if let Entry::Ready(container) = entry {
                container.gone_from_guest().await;
            }
        }
    }

    /// # Errors
    /// There is no such container, or it is still being created.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        match self.containers().get(id) {
            Some(Entry::Ready(container)) => Ok(Arc::clone(container)),
            Some(Entry::Creating) => Err(PodError::BeingCreated { id: id.to_owned() }),
            None => Err(PodError::NoContainer { id: id.to_owned() }),
        }
    }

    /// No container exists or is being created.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    async fn agent(&self, id: &str) -> Result<agent::Client, PodError> {
        let vm = self.shared.vm.lock().await.clone().ok_or_else(|| PodError::Gone { id: id.to_owned() })?;
        vm.agent().await.map_err(|source| PodError::Vm { what: "reach the guest agent", source })
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.shared.containers.lock().expect("no panic while held")
    }

    fn emit(&self, event: Event) {
        // Nobody listens any more only when the owner of the pod is ending.
        let _ = self.shared.events.send(event);
    }
}
