//! One process of a container: its exit, its streams, and the host's calls for it.

use machinen_protocol::error::{ErrorKind, HasKind};
use nix::{errno::Errno, unistd::Pid};
use tokio::{
    sync::{oneshot, watch},
    task::{AbortHandle, JoinHandle},
};

use crate::{
    cgroup::Cgroup,
    channel::Stream,
    console,
    reaper::Reaper,
    stdio::{AgentEnds, Input, Pipe, Stdin, Terminal, WindowSize, pump_out},
    sys::WaitStatus,
};

#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    reaper: Reaper,
    stage: watch::Receiver<ExitStage>,
    stdin: Stdin,
    /// CRIU's names of the pipes that were made for its standard streams. CRIU replaces them when it restores
    /// the process.
    pipes: [Option<String>; 3],
    terminal: Option<Terminal>,
    tasks: Vec<AbortHandle>,
}

/// A process ends in two steps: first it exits, then the host has all of its output.
#[derive(Debug, Clone, Copy)]
enum ExitStage {
    Running,
    Exited,
    Done(Ended),
}

/// The result of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) code: u32,
    pub(crate) stdout_bytes: u64,
    pub(crate) stderr_bytes: u64,
    pub(crate) oom_kills: u64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("process already finished")]
    Finished,
    #[error("cannot send signal {signal}")]
    Signal { signal: i32, source: Errno },
    #[error("stdin ends after {total} bytes, but more have arrived")]
    StdinEnd { total: u64 },
    #[error("the process was deleted")]
    Deleted,
    #[error("the process is still running")]
    Running,
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("cannot resize the process's terminal")]
    Resize(#[source] Errno),
}

impl HasKind for ProcessError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Finished | Self::Deleted => ErrorKind::NotFound,
            Self::Signal { source: Errno::EINVAL, .. } | Self::StdinEnd { .. } => ErrorKind::InvalidArgument,
            Self::Running | Self::NoTerminal => ErrorKind::FailedPrecondition,
            Self::Signal { .. } | Self::Resize(_) => ErrorKind::Internal,
        }
    }
}

/// A process that was just started, for its supervision.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<WaitStatus>,
    pub(crate) ends: AgentEnds,
    pub(crate) cgroup: Cgroup,
    /// The process is the container's first one, with which all others end. In a pid namespace of the
    /// container's own the kernel ends them; where processes share the VM's, the agent does.
    pub(crate) is_init: bool,
}

impl Process {
    /// Starts the pumps and the task that waits for the process.
    pub(crate) fn supervise(started: Started, reaper: Reaper) -> Self {
        let Started { pid, exit, ends, cgroup, is_init } = started;
        let (stage_sender, stage) = watch::channel(ExitStage::Running);
        let (ended, _) = watch::channel(false);
        let pipes = ends.pipes.each_ref().map(|pipe| pipe.as_ref().map(Pipe::name));
        let [stdin_pipe, ..] = ends.pipes;
        let has_stream = ends.stdin.as_ref().is_some_and(Input::has_stream);
        let stdin = Stdin::new(stdin_pipe, &ends.unread, has_stream);
        let mut tasks = Vec::new();
        let pump_stdin = ends.stdin.map(|input| tokio::spawn(stdin.clone().pump(input)));
        tasks.extend(pump_stdin.as_ref().map(JoinHandle::abort_handle));
        // A terminal whose output is not read any more is hung up, so no other pump may keep it open.
        let hang_up = ends.terminal.as_ref().and(pump_stdin.as_ref().map(JoinHandle::abort_handle));
        let mut out = |end: Option<_>| {
            let hang_up = hang_up.clone();
            let task = end.map(|(source, stream)| {
                let pump = pump_out(source, stream, ended.subscribe());
                tokio::spawn(async move {
                    let done = pump.await;
                    if let Some(stdin) = hang_up {
                        stdin.abort();
                    }
                    done
                })
            });
            tasks.extend(task.as_ref().map(JoinHandle::abort_handle));
            task
        };
        let (stdout, stderr) = (out(ends.stdout), out(ends.stderr));
        let supervisor = tokio::spawn(async move {
            let Ok(status) = exit.await else { return };
            if is_init && let Err(err) = cgroup.kill() {
                console::report(&err);
            }
            stage_sender.send_replace(ExitStage::Exited);
            if let Some(stdin) = pump_stdin {
                stdin.abort();
            }
            ended.send_replace(true);
            // The streams must stay open until the host has read what they carry.
            let ((stdout_bytes, _out), (stderr_bytes, _err)) = (finish(stdout).await, finish(stderr).await);
            stage_sender.send_replace(ExitStage::Done(Ended {
                code: status.code(),
                stdout_bytes,
                stderr_bytes,
                oom_kills: cgroup.oom_kills(),
            }));
            stage_sender.closed().await;
        });
        tasks.push(supervisor.abort_handle());
        Self { pid, reaper, stage, stdin, pipes, terminal: ends.terminal, tasks }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether the process has exited; output may still be pending.
    pub(crate) fn has_exited(&self) -> bool {
        !matches!(*self.stage.borrow(), ExitStage::Running)
    }

    /// Waits until the process has exited.
    pub(crate) async fn exited(&self) {
        let mut stage = self.stage.clone();
        // An error means that the supervisor was stopped, which only a deletion does.
        let _ = stage.wait_for(|stage| !matches!(stage, ExitStage::Running)).await;
    }

    /// Waits until the process has exited and its output was handed to its streams.
    ///
    /// # Errors
    /// The process is deleted meanwhile.
    pub(crate) async fn ended(&self) -> Result<Ended, ProcessError> {
        let mut stage = self.stage.clone();
        loop {
            if let ExitStage::Done(ended) = *stage.borrow_and_update() {
                return Ok(ended);
            }
            stage.changed().await.map_err(|_| ProcessError::Deleted)?;
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process has ended, or the signal does not exist.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), ProcessError> {
        match self.reaper.signal(self.pid, signal) {
            Ok(true) => Ok(()),
            Ok(false) | Err(Errno::ESRCH) => Err(ProcessError::Finished),
            Err(source) => Err(ProcessError::Signal { signal, source }),
        }
    }

    /// Ends the process's stdin after `total` bytes.
    ///
    /// # Errors
    /// More bytes have arrived already.
    pub(crate) fn end_stdin(&self, total: u64) -> Result<(), ProcessError> {
        if self.stdin.end_at(total) { Ok(()) } else { Err(ProcessError::StdinEnd { total }) }
    }

    /// CRIU's names of the pipes that were made for its standard streams.
    pub(crate) fn pipes(&self) -> &[Option<String>; 3] {
        &self.pipes
    }

    pub(crate) fn stdin(&self) -> &Stdin {
        &self.stdin
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// The process has no terminal, or the terminal is gone.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<(), ProcessError> {
        match self.terminal.as_ref().ok_or(ProcessError::NoTerminal)?.resize(size) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ProcessError::Finished),
            Err(source) => Err(ProcessError::Resize(source)),
        }
    }

    /// Closes the process's streams, even if the host has not read them.
    pub(crate) fn close(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.close();
    }
}

async fn finish(pump: Option<JoinHandle<(u64, Option<Stream>)>>) -> (u64, Option<Stream>) {
    match pump {
        None => (0, None),
        // A pump ends by itself, or is aborted together with its supervisor.
        Some(pump) => pump.await.unwrap_or((0, None)),
    }
}
