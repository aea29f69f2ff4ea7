//! Processes that are added to a container.
//!
//! ```text
//!   exec   ---> the process is read and named                 nothing of it exists in the guest
//!   start  ---> streams -> ExecProcess; a watcher waits for the end
//!   end    ---> output drained -> Stopped, event -> the guest forgets it
//!   delete ---> the entry goes, its id is free
//! ```
//! The states of such a process are those of a container. A process that could not be started counts as
//! stopped, although it never ran.

use std::{
    collections::{HashMap, hash_map},
    sync::{Arc, Mutex, MutexGuard},
    time::SystemTime,
};

use machinen_base::error::{ErrorKind, HasKind, chain};
use machinen_protocol::{
    api::ExecProcessRequest,
    process::{ProcessRef, SignalTarget},
};
use machinen_vm::agent;
use oci_spec::runtime;
use protobuf::MessageField;

use super::{
    Container, ContainerId, ContainerProcess, ExecId, Pod, PodError, PodEvent, PodRequest, ProcessExit,
    ProcessId, ProcessState, SignalScope, StateError, Transition,
    exit::finish_process,
    stdio::{HostStdio, ProcessStdio},
    streams::{self, Outputs},
};
use crate::spec;

/// The exit statuses by which shells report a command that cannot be executed and one that does not exist,
/// and by which runc reports every other failure to start.
const NOT_EXECUTABLE: u32 = 126;
const NOT_FOUND: u32 = 127;
const NOT_STARTED: u32 = 255;

/// A request to add a process to a container.
#[derive(Debug)]
pub struct ExecRequest {
    /// The container that the process is added to.
    pub container: ContainerId,
    /// Unique among the container's processes.
    pub id: ExecId,
    /// OCI process (runtime-spec, config.md, "Process"), as JSON.
    pub process: Vec<u8>,
    /// Where the process's standard streams lead.
    pub stdio: ProcessStdio,
}

/// A process that was added to a container.
#[derive(Debug)]
pub(super) struct AddedProcess {
    id: ExecId,
    /// The process in messages.
    name: String,
    pub(super) process: Arc<ContainerProcess>,
    stage: Mutex<ExecStage>,
}

#[derive(Debug)]
enum ExecStage {
    Described(Box<DescribedProcess>),
    /// The guest knows the process by an id of its own, so the caller's id can be any text and can be reused
    /// at once.
    Sent(ProcessRef),
    /// It is being started, or could not be started.
    Taken,
}

/// What a process that has not been started is made of.
#[derive(Debug)]
struct DescribedProcess {
    process: runtime::Process,
    stdio: ProcessStdio,
}

/// All processes that were added to a container.
#[derive(Debug, Default)]
pub(super) struct Execs(Mutex<ExecTable>);

#[derive(Debug, Default)]
struct ExecTable {
    added: HashMap<ExecId, Arc<AddedProcess>>,
    started: u64,
    /// The container's init has ended, so no further process may start.
    closed: bool,
}

impl Execs {
    fn lock(&self) -> MutexGuard<'_, ExecTable> {
        self.0.lock().expect("no panic while held")
    }

    fn get(&self, id: &ExecId) -> Option<Arc<AddedProcess>> {
        self.lock().added.get(id).map(Arc::clone)
    }

    /// Returns a name for the guest, or None when no further process may start.
    fn admit(&self) -> Option<ProcessRef> {
        let mut table = self.lock();
        if table.closed {
            return None;
        }
        table.started += 1;
        Some(ProcessRef::Exec(format!("exec-{}", table.started)))
    }

    /// Refuses further starts, and waits until every process that was started has ended.
    pub(super) async fn end(&self) {
        let added: Vec<_> = {
            let mut table = self.lock();
            table.closed = true;
            table.added.values().cloned().collect()
        };
        for exec in added {
            // A start that is under way holds this lock.
            let state = {
                let _ordered = exec.process.transitions.lock().await;
                exec.process.state()
            };
            if state != ProcessState::Created {
                exec.process.exited().await;
            }
        }
    }
}

impl AddedProcess {
    fn stage(&self) -> MutexGuard<'_, ExecStage> {
        self.stage.lock().expect("no panic while held")
    }

    /// Takes what the process is made of, in order to start it.
    fn take(&self) -> Result<Box<DescribedProcess>, PodError> {
        let mut stage = self.stage();
        match std::mem::replace(&mut *stage, ExecStage::Taken) {
            ExecStage::Described(described) => Ok(described),
            other => {
                *stage = other;
                Err(PodError::state(PodRequest::Start, &self.name, StateError::AlreadyStarted))
            }
        }
    }

    /// The process in the guest; None if it is not there yet. Waits for a start that is under way.
    async fn in_guest(&self) -> Option<ProcessRef> {
        let _decided = self.process.transitions.lock().await;
        match &*self.stage() {
            ExecStage::Described(_) | ExecStage::Taken => None,
            ExecStage::Sent(process) => Some(process.clone()),
        }
    }

    /// Sets the initial size of the process's terminal; returns false if the process was started already.
    async fn set_initial_size(&self, width: u32, height: u32) -> bool {
        let _decided = self.process.transitions.lock().await;
        let ExecStage::Described(described) = &mut *self.stage() else { return false };
        let size = runtime::BoxBuilder::default().width(width).height(height).build();
        described.process.set_console_size(Some(size.expect("every field is given")));
        true
    }
}

impl Container {
    /// The process that was added as `exec`, or the container's init.
    ///
    /// # Errors
    /// The process does not exist.
    pub fn process(&self, exec: Option<&ExecId>) -> Result<Arc<ContainerProcess>, PodError> {
        match exec {
            None => Ok(Arc::clone(&self.init)),
            Some(exec) => Ok(Arc::clone(&self.added(exec)?.process)),
        }
    }

    fn added(&self, exec: &ExecId) -> Result<Arc<AddedProcess>, PodError> {
        let missing = || PodError::NoProcess { id: self.id.clone(), exec: exec.clone() };
        self.execs.get(exec).ok_or_else(missing)
    }

    /// The processes in the guest that a signal is for.
    ///
    /// # Errors
    /// The process does not exist, or is not running.
    pub(super) async fn signal_target(&self, scope: &SignalScope) -> Result<SignalTarget, PodError> {
        match scope {
            SignalScope::One(process) => {
                self.in_guest(process, PodRequest::Signal).await.map(SignalTarget::One)
            }
            SignalScope::All(_) => self.check(PodRequest::Signal).map(|()| SignalTarget::All),
        }
    }

    /// A process of this container in the guest. Waits for a start that is under way.
    ///
    /// # Errors
    /// The process does not exist, or is not running.
    async fn in_guest(&self, id: &ProcessId, request: PodRequest) -> Result<ProcessRef, PodError> {
        let in_guest = match &id.exec {
            None => Some(ProcessRef::Init),
            Some(exec) => self.added(exec)?.in_guest().await,
        };
        let refused = |source| PodError::state(request, &id.to_string(), source);
        self.process(id.exec.as_ref())?.state().allows(request).map_err(refused)?;
        in_guest.ok_or_else(|| refused(StateError::NotStarted))
    }
}

impl Pod {
    /// Adds a process to a container, to be started.
    ///
    /// # Errors
    /// The container does not exist or has stopped, the id is taken, or the process is not valid.
    pub fn exec(&self, exec: ExecRequest) -> Result<(), PodError> {
        let container = self.container(&exec.container)?;
        container.check(PodRequest::Exec)?;
        let process = spec::exec::reduce(&exec.process, exec.stdio.terminal)?;
        let added = AddedProcess {
            id: exec.id.clone(),
            name: container.id.exec(&exec.id).to_string(),
            process: Arc::new(ContainerProcess::new(exec.stdio.names())),
            stage: Mutex::new(ExecStage::Described(Box::new(DescribedProcess {
                process,
                stdio: exec.stdio,
            }))),
        };
        match container.execs.lock().added.entry(exec.id.clone()) {
            hash_map::Entry::Occupied(_) => {
                return Err(PodError::ExecExists { id: exec.container, exec: exec.id });
            }
            hash_map::Entry::Vacant(entry) => _ = entry.insert(Arc::new(added)),
        }
        self.emit(PodEvent::ExecAdded { id: exec.container, exec: exec.id });
        Ok(())
    }

    /// Starts a process that was added; returns the pid that stands for it, which is that of the container's
    /// anchor.
    ///
    /// # Errors
    /// The process does not exist or was started before, the container is not running, or the command cannot
    /// be executed.
    pub(super) async fn start_exec(&self, id: &ContainerId, exec: &ExecId) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let exec = container.added(exec)?;
        // Runs in a task of its own, so that a caller that goes away does not leave a half-started process.
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.start_added(container, exec).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn start_added(&self, container: Arc<Container>, exec: Arc<AddedProcess>) -> Result<u32, PodError> {
        let refused = |source| PodError::state(PodRequest::Start, &exec.name, source);
        let _ordered = exec.process.transitions.lock().await;
        exec.process.state().after(Transition::Start).map_err(refused)?;
        let _thawed = container.freezing.read().await;
        container.check(PodRequest::Exec)?;
        match self.send(&container, &exec).await {
            Ok(watch) => {
                exec.process.advance(Transition::Start).map_err(refused)?;
                self.emit(PodEvent::ExecStarted {
                    id: container.id.clone(),
                    exec: exec.id.clone(),
                    pid: container.pid,
                });
                tokio::spawn(self.clone().watch_exec(Arc::clone(&container), Arc::clone(&exec), watch));
                Ok(container.pid)
            }
            Err(error) => {
                let status = match error.kind() {
                    ErrorKind::PermissionDenied => NOT_EXECUTABLE,
                    ErrorKind::NotFound => NOT_FOUND,
                    _ => NOT_STARTED,
                };
                exec.process.advance(Transition::Exited(exit(status))).map_err(refused)?;
                exec.process.set_gone();
                Err(error)
            }
        }
    }

    /// Asks the guest to run the process.
    async fn send(&self, container: &Container, exec: &AddedProcess) -> Result<ExecWatch, PodError> {
        let DescribedProcess { process, stdio } = *exec.take()?;
        let mut host = HostStdio::open(&stdio, &self.owner(&exec.id))?;
        drop(stdio);
        host.ready().await?;
        let vm = self.vm_of(&container.id).await?;
        let agent = self.agent(&container.id).await?;
        let gone = || PodError::state(PodRequest::Exec, &container.id, StateError::AlreadyStopped);
        let in_guest = container.execs.admit().ok_or_else(gone)?;
        *exec.stage() = ExecStage::Sent(in_guest.clone());
        let _starting = self.shared.starting.acquire().await.expect("never closed");
        let (stdio, mut streams) = streams::connect(&vm, host).await?;
        let request = ExecProcessRequest {
            container_id: container.id.to_string(),
            exec_id: in_guest.to_wire(),
            process: serde_json::to_vec(&process).map_err(PodError::Encode)?,
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        exec.process.connect_stdin(streams.take_input(&agent, &container.id, in_guest.clone()));
        let stdin = exec.process.open_stdin()?;
        agent.exec_process(request).await.map_err(|source| PodError::guest("start", &exec.name, source))?;
        exec.process.feed(stdin);
        Ok(ExecWatch { agent, in_guest, outputs: streams.outputs })
    }

    async fn watch_exec(self, container: Arc<Container>, exec: Arc<AddedProcess>, watch: ExecWatch) {
        let ExecWatch { agent, in_guest, outputs } = watch;
        let name = exec.name.as_str();
        let waited = agent.wait_process(&container.id, &in_guest);
        let (_, exit, logger) = finish_process(name, &container.kill_clock, outputs, waited).await;
        {
            let _ordered = exec.process.transitions.lock().await;
            if let Err(error) = exec.process.advance(Transition::Exited(exit)) {
                tracing::error!(id = name, "exit reported twice: {error}");
            }
            tracing::debug!(id = name, status = exit.status, "process exited");
            self.emit(PodEvent::Exited { process: container.id.exec(&exec.id), pid: container.pid, exit });
        }
        // This fails when the VM has ended, and then there is nothing left to remove.
        if let Err(error) = agent.delete_process(&container.id, &in_guest).await {
            tracing::debug!(id = name, "cannot remove the process from the guest: {}", chain(&error));
        }
        if let Some(logger) = logger {
            logger.finish().await;
        }
        exec.process.set_gone();
    }

    /// Removes a process that has ended or was never started.
    ///
    /// # Errors
    /// The process does not exist, or is running.
    pub(super) async fn delete_exec(
        &self,
        id: &ContainerId,
        exec: &ExecId,
    ) -> Result<(u32, ProcessExit), PodError> {
        let container = self.container(id)?;
        let exec = container.added(exec)?;
        let refused = |source| PodError::state(PodRequest::Delete, &exec.name, source);
        let (pid, exit) = {
            let _ordered = exec.process.transitions.lock().await;
            let never_ran = exec.process.state() == ProcessState::Created;
            if never_ran {
                exec.process.advance(Transition::Exited(exit(0))).map_err(refused)?;
                exec.process.set_gone();
            }
            exec.process.state().after(Transition::Delete).map_err(refused)?;
            (if never_ran { 0 } else { container.pid }, exec.process.exited().await)
        };
        exec.process.gone().await;
        container.execs.lock().added.remove(&exec.id);
        Ok((pid, exit))
    }

    /// Sets the size of a process's terminal, in characters. For a process that is not running yet, this is
    /// the initial size.
    ///
    /// # Errors
    /// The process does not exist, has ended, or has no terminal.
    pub async fn resize(&self, id: &ProcessId, width: u32, height: u32) -> Result<(), PodError> {
        let container = self.container(&id.container)?;
        if !container.process(id.exec.as_ref())?.stdio.terminal {
            return Err(PodError::state(PodRequest::Resize, &id.to_string(), StateError::NoTerminal));
        }
        if let Some(exec) = &id.exec
            && container.added(exec)?.set_initial_size(width, height).await
        {
            return Ok(());
        }
        let in_guest = container.in_guest(id, PodRequest::Resize).await?;
        let agent = self.agent(&container.id).await?;
        agent
            .resize_terminal(&container.id, &in_guest, width, height)
            .await
            .map_err(|source| PodError::guest(PodRequest::Resize.verb(), &id.to_string(), source))
    }
}

/// What the watcher of an added process needs.
struct ExecWatch {
    agent: agent::Client,
    in_guest: ProcessRef,
    outputs: Outputs,
}

fn exit(status: u32) -> ProcessExit {
    ProcessExit { status, at: SystemTime::now() }
}
