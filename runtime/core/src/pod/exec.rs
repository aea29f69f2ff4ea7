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
use machinen_protocol::api::ExecProcessRequest;
use machinen_vm::agent;
use oci_spec::runtime;
use protobuf::MessageField;

use super::{
    Container, ContainerProcess, Pod, PodError, PodEvent, PodRequest, ProcessExit, ProcessState, StateError,
    Transition,
    exit::finish_process,
    stdio::{HostStdio, StdioNames},
    streams::{self, Outputs},
};
use crate::spec;

/// The exit statuses by which shells report a command that cannot be executed and one that does not exist,
/// and by which runc reports every other failure to start.
const NOT_EXECUTABLE: u32 = 126;
const NOT_FOUND: u32 = 127;
const NOT_STARTED: u32 = 255;

/// A request to add a process to a container.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    /// Unique among the container's processes.
    pub id: String,
    /// OCI process (runtime-spec, config.md, "Process"), as JSON.
    pub process: Vec<u8>,
    /// Where the process's standard streams lead.
    pub stdio: StdioNames,
}

/// A process that was added to a container.
#[derive(Debug)]
pub(super) struct AddedProcess {
    id: String,
    pub(super) process: Arc<ContainerProcess>,
    stage: Mutex<ExecStage>,
}

#[derive(Debug)]
enum ExecStage {
    Described(Box<runtime::Process>),
    /// The guest knows the process by an id of its own, so the caller's id can be any text and can be reused
    /// at once.
    Sent {
        guest_id: String,
    },
}

/// All processes that were added to a container.
#[derive(Debug, Default)]
pub(super) struct Execs(Mutex<ExecTable>);

#[derive(Debug, Default)]
struct ExecTable {
    added: HashMap<String, Arc<AddedProcess>>,
    started: u64,
    /// The container's init has ended, so no further process may start.
    closed: bool,
}

impl Execs {
    fn lock(&self) -> MutexGuard<'_, ExecTable> {
        self.0.lock().expect("no panic while held")
    }

    fn get(&self, id: &str) -> Option<Arc<AddedProcess>> {
        self.lock().added.get(id).map(Arc::clone)
    }

    /// Returns an id for the guest, or None when no further process may start.
    fn admit(&self) -> Option<String> {
        let mut table = self.lock();
        if table.closed {
            return None;
        }
        table.started += 1;
        Some(format!("exec-{}", table.started))
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

    async fn guest_id(&self) -> Option<String> {
        let _decided = self.process.transitions.lock().await;
        match &*self.stage() {
            ExecStage::Described(_) => None,
            ExecStage::Sent { guest_id } => Some(guest_id.clone()),
        }
    }
}

impl AddedProcess {
    /// Sets the initial size of the process's terminal; returns false if the process was started already.
    async fn set_initial_size(&self, width: u32, height: u32) -> bool {
        let _decided = self.process.transitions.lock().await;
        let ExecStage::Described(process) = &mut *self.stage() else { return false };
        let size = runtime::BoxBuilder::default().width(width).height(height).build();
        process.set_console_size(Some(size.expect("every field is given")));
        true
    }
}

impl Container {
    /// # Errors
    /// The process does not exist.
    pub fn process(&self, exec_id: &str) -> Result<Arc<ContainerProcess>, PodError> {
        match exec_id {
            "" => Ok(Arc::clone(&self.init)),
            _ => Ok(Arc::clone(&self.added(exec_id)?.process)),
        }
    }

    fn added(&self, exec_id: &str) -> Result<Arc<AddedProcess>, PodError> {
        let missing = || PodError::NoProcess { id: self.id.clone(), exec_id: exec_id.to_owned() };
        self.execs.get(exec_id).ok_or_else(missing)
    }

    /// The id by which the guest knows a process; the init's is "". Waits for a start that is under way.
    ///
    /// # Errors
    /// The process does not exist, or is not running.
    pub(super) async fn guest_id(&self, exec_id: &str, request: PodRequest) -> Result<String, PodError> {
        let guest_id = match exec_id {
            "" => Some(String::new()),
            _ => self.added(exec_id)?.guest_id().await,
        };
        let refused = |source| PodError::State { request, id: self.name(exec_id), source };
        self.process(exec_id)?.state().allows(request).map_err(refused)?;
        guest_id.ok_or_else(|| refused(StateError::NotStarted))
    }

    /// The process's name in messages.
    pub(super) fn name(&self, exec_id: &str) -> String {
        if exec_id.is_empty() { self.id.clone() } else { format!("{}, process {exec_id}", self.id) }
    }
}

impl Pod {
    /// Adds a process to a container, to be started.
    ///
    /// # Errors
    /// The container does not exist or has stopped, the id is taken, or the process is not valid.
    pub fn exec(&self, id: &str, exec: ExecRequest) -> Result<(), PodError> {
        let container = self.container(id)?;
        container.check(PodRequest::Exec)?;
        if exec.id.is_empty() {
            return Err(PodError::NoExecId { id: id.to_owned() });
        }
        let process = spec::exec::reduce(&exec.process, exec.stdio.terminal)?;
        let added = AddedProcess {
            id: exec.id.clone(),
            process: Arc::new(ContainerProcess::new(exec.stdio)),
            stage: Mutex::new(ExecStage::Described(Box::new(process))),
        };
        match container.execs.lock().added.entry(exec.id.clone()) {
            hash_map::Entry::Occupied(_) => {
                return Err(PodError::ExecExists { id: id.to_owned(), exec_id: exec.id });
            }
            hash_map::Entry::Vacant(entry) => _ = entry.insert(Arc::new(added)),
        }
        self.emit(PodEvent::ExecAdded { id: id.to_owned(), exec_id: exec.id });
        Ok(())
    }

    /// Starts a process that was added; returns the pid that stands for it, which is that of the container's
    /// anchor.
    ///
    /// # Errors
    /// The process does not exist or was started before, the container is not running, or the command cannot
    /// be executed.
    pub async fn start_exec(&self, id: &str, exec_id: &str) -> Result<u32, PodError> {
        let container = self.container(id)?;
        let exec = container.added(exec_id)?;
        // Runs in a task of its own, so that a caller that goes away does not leave a half-started process.
        let pod = self.clone();
        let task = tokio::spawn(async move { pod.start_added(container, exec).await });
        task.await.map_err(PodError::Worker)?
    }

    async fn start_added(&self, container: Arc<Container>, exec: Arc<AddedProcess>) -> Result<u32, PodError> {
        let refused = |source| PodError::state(PodRequest::Start, &container.name(&exec.id), source);
        let _ordered = exec.process.transitions.lock().await;
        exec.process.state().after(Transition::Start).map_err(refused)?;
        let _thawed = container.freezing.read().await;
        container.check(PodRequest::Exec)?;
        match self.send(&container, &exec).await {
            Ok(watch) => {
                exec.process.advance(Transition::Start).map_err(refused)?;
                self.emit(PodEvent::ExecStarted {
                    id: container.id.clone(),
                    exec_id: exec.id.clone(),
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
        let mut host = HostStdio::open(&exec.process.stdio, &self.owner(&exec.id))?;
        host.ready().await?;
        let vm = self.vm_of(&container.id).await?;
        let agent = self.agent(&container.id).await?;
        let gone = || PodError::state(PodRequest::Exec, &container.id, StateError::AlreadyStopped);
        let guest_id = container.execs.admit().ok_or_else(gone)?;
        let stage = std::mem::replace(&mut *exec.stage(), ExecStage::Sent { guest_id: guest_id.clone() });
        let ExecStage::Described(process) = stage else {
            return Err(PodError::state(
                PodRequest::Start,
                &container.name(&exec.id),
                StateError::AlreadyStarted,
            ));
        };
        let _starting = self.shared.starting.acquire().await.expect("never closed");
        let (stdio, mut streams) = streams::connect(&vm, host).await?;
        let request = ExecProcessRequest {
            container_id: container.id.clone(),
            exec_id: guest_id.clone(),
            process: serde_json::to_vec(&process).map_err(PodError::Encode)?,
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        exec.process.connect_stdin(streams.take_input(&agent, &container.id, &guest_id));
        let stdin = exec.process.open_stdin()?;
        agent
            .exec_process(request)
            .await
            .map_err(|source| PodError::guest("start", &container.name(&exec.id), source))?;
        exec.process.feed(stdin);
        Ok(ExecWatch { agent, guest_id, outputs: streams.outputs })
    }

    async fn watch_exec(self, container: Arc<Container>, exec: Arc<AddedProcess>, watch: ExecWatch) {
        let ExecWatch { agent, guest_id, outputs } = watch;
        let name = container.name(&exec.id);
        let waited = agent.wait_process(&container.id, &guest_id);
        let (_, exit, logger) = finish_process(&name, &container.kill_clock, outputs, waited).await;
        {
            let _ordered = exec.process.transitions.lock().await;
            if let Err(error) = exec.process.advance(Transition::Exited(exit)) {
                tracing::error!(id = name, "exit reported twice: {error}");
            }
            tracing::debug!(id = name, status = exit.status, "process exited");
            self.emit(PodEvent::Exited {
                id: container.id.clone(),
                exec_id: exec.id.clone(),
                pid: container.pid,
                exit,
            });
        }
        // This fails when the VM has ended, and then there is nothing left to remove.
        if let Err(error) = agent.delete_process(&container.id, &guest_id).await {
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
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, ProcessExit), PodError> {
        let container = self.container(id)?;
        let exec = container.added(exec_id)?;
        let refused = |source| PodError::state(PodRequest::Delete, &container.name(exec_id), source);
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
        container.execs.lock().added.remove(exec_id);
        Ok((pid, exit))
    }

    /// Sets the size of a process's terminal, in characters. For a process that is not running yet, this is
    /// the initial size.
    ///
    /// # Errors
    /// The process does not exist, has ended, or has no terminal.
    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<(), PodError> {
        let container = self.container(id)?;
        if !container.process(exec_id)?.stdio.terminal {
            return Err(PodError::state(
                PodRequest::Resize,
                &container.name(exec_id),
                StateError::NoTerminal,
            ));
        }
        if !exec_id.is_empty() && container.added(exec_id)?.set_initial_size(width, height).await {
            return Ok(());
        }
        let guest_id = container.guest_id(exec_id, PodRequest::Resize).await?;
        let agent = self.agent(id).await?;
        agent
            .resize_terminal(id, &guest_id, width, height)
            .await
            .map_err(|source| PodError::guest(PodRequest::Resize.verb(), &container.name(exec_id), source))
    }
}

/// What the watcher of an added process needs.
struct ExecWatch {
    agent: agent::Client,
    guest_id: String,
    outputs: Outputs,
}

fn exit(status: u32) -> ProcessExit {
    ProcessExit { status, at: SystemTime::now() }
}
