//! A process's streams between the caller and the guest: connected, watched to their ends.

use std::fmt;

use machinen_protocol::{
    MAX_UNCLAIMED_STREAMS,
    api::{self, WaitProcessResponse},
};
use tokio::sync::watch;

use super::{
    PodError,
    stdio::{HostStdio, Input, InputEnd, Logger, Output, Stdin, StdinFifo, StdioError},
};
use crate::{
    agent,
    vm::{BoxedStream, Vm},
};

/// How many processes may be starting at once: each has three streams open that the agent has not claimed.
pub(super) const STARTING: usize = MAX_UNCLAIMED_STREAMS / 3;

/// The streams of a process, connected on both sides, but for the caller's end of stdin.
pub(super) struct Streams {
    stdin: Option<(StdinFifo, BoxedStream)>,
    terminal: bool,
    pub(super) outputs: Outputs,
}

/// Stdin of a process that has not started: the guest's end is connected, the caller's is not open.
pub(super) struct PendingInput {
    fifo: StdinFifo,
    to_guest: BoxedStream,
    terminal: bool,
    agent: agent::Client,
    /// Of the container, and of the process in it as the guest knows it; the init is "".
    id: (String, String),
}

/// The two output streams of a process, and what takes them.
#[derive(Debug)]
pub(super) struct Outputs {
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Logger>,
}

/// Opens a raw stream to the guest for each stream of the caller's.
///
/// # Errors
/// The VM is gone.
pub(super) async fn connect(vm: &Vm, host: HostStdio) -> Result<(api::Stdio, Streams), PodError> {
    let mut stdio = api::Stdio { terminal: host.terminal, ..Default::default() };
    let open = async |wanted: bool| match wanted {
        true => vm.open_stream().await.map(Some),
        false => Ok(None),
    };
    // At once: each takes a round trip to the guest.
    let opened = tokio::try_join!(
        open(host.stdin.is_some()),
        open(host.stdout.is_some()),
        open(host.stderr.is_some())
    );
    let failed = |source| PodError::Vm { what: "open a stream to the guest", source };
    let (from_caller, stdout, stderr) = opened.map_err(failed)?;
    let stdin = host.stdin.zip(from_caller).map(|(source, (token, stream))| {
        stdio.stdin = token;
        (source, stream)
    });
    let mut outputs = Outputs { stdout: None, stderr: None, logger: host.logger };
    outputs.stdout = host.stdout.zip(stdout).map(|(sink, (token, stream))| {
        stdio.stdout = token;
        Output::to("stdout", stream, sink)
    });
    outputs.stderr = host.stderr.zip(stderr).map(|(sink, (token, stream))| {
        stdio.stderr = token;
        Output::to("stderr", stream, sink)
    });
    Ok((stdio, Streams { stdin, terminal: host.terminal, outputs }))
}

impl Streams {
    /// Stdin of a process that the guest knows by these ids.
    pub(super) fn take_input(&mut self, agent: &agent::Client, id: &str, exec: &str) -> Option<PendingInput> {
        let (fifo, to_guest) = self.stdin.take()?;
        let id = (id.to_owned(), exec.to_owned());
        Some(PendingInput { fifo, to_guest, terminal: self.terminal, agent: agent.clone(), id })
    }
}

impl fmt::Debug for PendingInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingInput").field("fifo", &self.fifo).field("id", &self.id).finish_non_exhaustive()
    }
}

impl PendingInput {
    /// Opens the caller's end.
    ///
    /// # Errors
    /// Those of open(2).
    pub(super) fn open(&self) -> Result<Stdin, StdioError> {
        self.fifo.open()
    }

    /// Starts to copy from the caller's end.
    pub(super) fn start(self, stdin: Stdin, closed: watch::Receiver<bool>) -> Input {
        let Self { to_guest, terminal, agent, id: (id, exec), .. } = self;
        Input::start(stdin, InputEnd { closed, terminal }, to_guest, async move |total| {
            if let Err(error) = agent.end_stdin(&id, &exec, total).await {
                // A process that has ended needs no end of its stdin.
                tracing::debug!(id, exec, "end of stdin not delivered: {error}");
            }
        })
    }
}

impl Outputs {
    /// Waits until the caller has everything that the process has written; what takes it may still be at it.
    pub(super) async fn deliver(self, id: &str, ended: &WaitProcessResponse) -> Option<Logger> {
        let finish = async |output: Option<Output>, bytes| match output {
            Some(output) => output.finish(bytes).await,
            None => Ok(()),
        };
        let (stdout, stderr) =
            tokio::join!(finish(self.stdout, ended.stdout_bytes), finish(self.stderr, ended.stderr_bytes));
        for problem in [stdout, stderr].into_iter().filter_map(Result::err) {
            tracing::error!(id, "{problem}");
        }
        self.logger
    }

    /// Delivers what has arrived from a guest that is gone.
    pub(super) async fn abandon(self) -> Option<Logger> {
        for output in [self.stdout, self.stderr].into_iter().flatten() {
            output.abandon().await;
        }
        self.logger
    }
}
