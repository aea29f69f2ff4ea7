//! One process of a container: its exit, its streams, and what the host may ask of it.

use std::time::SystemTime;

use nix::{errno::Errno, unistd::Pid};
use tokio::{
    sync::{oneshot, watch},
    task::{AbortHandle, JoinHandle},
};

use crate::{
    cgroup::Cgroup,
    channel::Stream,
    reaper::{Exit, Reaper},
    stdio::{AgentEnds, Input, Pipe, Stdin, Terminal, WindowSize, pump_out},
};

#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    reaper: Reaper,
    stage: watch::Receiver<Stage>,
    stdin: Stdin,
    /// What CRIU calls the pipes that its standard streams are, for as long as it has not put others in their place.
    pipes: [Option<String>; 3],
    terminal: Option<Terminal>,
    tasks: Vec<AbortHandle>,
}

/// A process ends in two steps: first it is gone, then the host has all of its output.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Running,
    Exited,
    Done(Ended),
}

/// Everything there is to say about the end of a process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
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
    #[error("stdin ends after {total} bytes, but more have come")]
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

/// What a process leaves to its supervisor when it starts.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: Pid,
    pub(crate) exit: oneshot::Receiver<Exit>,
    pub(crate) ends: AgentEnds,
    pub(crate) cgroup: Cgroup,
    /// It is the container's first process, with which all others end. The kernel sees to that in a pid namespace of the
    /// container's own; where processes share the VM's, the agent does.
    pub(crate) is_init: bool,
}

impl Process {
    /// Takes charge of a process that has just been made.
    pub(crate) fn supervise(started: Started, reaper: Reaper) -> Self {
        let Started { pid, exit, ends, cgroup, is_init } = started;
        let (stage_sender, stage) = watch::channel(Stage::Running);
        let (ended, _) = watch::channel(false);
        let pipes = ends.pipes.each_ref().map(|pipe| pipe.as_ref().map(Pipe::name));
        let [stdin_pipe, ..] = ends.pipes;
        let has_stream = ends.stdin.as_ref().is_some_and(Input::has_stream);
        let stdin = Stdin::new(stdin_pipe, &ends.unread, has_stream);
        let mut tasks = Vec::new();
        let pump_stdin = ends.stdin.map(|input| tokio::spawn(stdin.clone().pump(input)));
        tasks.extend(pump_stdin.as_ref().map(JoinHandle::abort_handle));
        // A terminal whose output nobody takes any more is hung up, for which nobody may hold it.
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
            let Ok(exit) = exit.await else { return };
            if is_init && let Err(err) = cgroup.kill() {
                crate::console::say(&crate::console::chain(&err));
            }
            stage_sender.send_replace(Stage::Exited);
            if let Some(stdin) = pump_stdin {
                stdin.abort();
            }
            ended.send_replace(true);
            // The streams must stay open until the host has read what they carry.
            let ((stdout_bytes, _out), (stderr_bytes, _err)) = (finish(stdout).await, finish(stderr).await);
            stage_sender.send_replace(Stage::Done(Ended {
                code: exit.code(),
                at: exit.at,
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

    /// Whether it is gone, its output notwithstanding.
    pub(crate) fn has_exited(&self) -> bool {
        !matches!(*self.stage.borrow(), Stage::Running)
    }

    /// Waits until it is gone.
    pub(crate) async fn exited(&self) {
        let mut stage = self.stage.clone();
        // An error means that the supervisor was stopped, which only deletion does.
        let _ = stage.wait_for(|stage| !matches!(stage, Stage::Running)).await;
    }

    /// Waits until it is gone and its output was handed to its streams.
    ///
    /// # Errors
    /// It is deleted meanwhile.
    pub(crate) async fn ended(&self) -> Result<Ended, ProcessError> {
        let mut stage = self.stage.clone();
        loop {
            if let Stage::Done(ended) = *stage.borrow_and_update() {
                return Ok(ended);
            }
            stage.changed().await.map_err(|_| ProcessError::Deleted)?;
        }
    }

    /// # Errors
    /// It has ended, or the signal does not exist.
    pub(crate) fn signal(&self, signal: i32) -> Result<(), ProcessError> {
        match self.reaper.signal(self.pid, signal) {
            Ok(true) => Ok(()),
            Ok(false) | Err(Errno::ESRCH) => Err(ProcessError::Finished),
            Err(source) => Err(ProcessError::Signal { signal, source }),
        }
    }

    /// The process sees the end of its stdin after `total` bytes.
    ///
    /// # Errors
    /// More than that were read already.
    pub(crate) fn end_stdin(&self, total: u64) -> Result<(), ProcessError> {
        if self.stdin.end_at(total) { Ok(()) } else { Err(ProcessError::StdinEnd { total }) }
    }

    /// The pipes that were made for its standard streams, as CRIU names them.
    pub(crate) fn pipes(&self) -> &[Option<String>; 3] {
        &self.pipes
    }

    pub(crate) fn stdin(&self) -> &Stdin {
        &self.stdin
    }

    /// # Errors
    /// It has no terminal, or none any more.
    pub(crate) fn resize(&self, size: WindowSize) -> Result<(), ProcessError> {
        match self.terminal.as_ref().ok_or(ProcessError::NoTerminal)?.resize(size) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ProcessError::Finished),
            Err(source) => Err(ProcessError::Resize(source)),
        }
    }

    /// Closes its streams, whether the host has read them or not.
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
        // A pump ends by itself, or is stopped together with its supervisor.
        Some(pump) => pump.await.unwrap_or((0, None)),
    }
}
