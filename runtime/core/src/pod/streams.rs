//! A process's streams between the caller and the guest: connected, and delivered to their ends.

use std::fmt;

use machinen_protocol::{
    MAX_UNCLAIMED_STREAMS,
    api::{self, WaitProcessResponse},
    process::ProcessRef,
};
use machinen_vm::{BoxedStream, Vm, agent};
use tokio::sync::watch;

use super::{
    PodError,
    stdio::{
        DiscardOutput, HostStdio, Logger, OutputCopy, StdinCopy, StdinEnd, StdinReader, StdinSource,
        StdioError,
    },
};

/// How many processes may be starting at once. Each has three streams open that the agent has not claimed.
pub(super) const STARTING: usize = MAX_UNCLAIMED_STREAMS / 3;

/// The streams of a process, connected at both ends except for the caller's end of stdin.
pub(super) struct ProcessStreams {
    stdin: Option<(StdinSource, BoxedStream)>,
    terminal: bool,
    pub(super) outputs: Outputs,
}

/// Stdin of a process that has not started: the guest's end is connected, the caller's is not open.
pub(super) struct PendingInput {
    source: StdinSource,
    to_guest: BoxedStream,
    terminal: bool,
    agent: agent::Client,
    container: String,
    process: ProcessRef,
}

/// The two output streams of a process, and the logging program that receives them.
#[derive(Debug)]
pub(super) struct Outputs {
    stdout: Option<OutputCopy>,
    stderr: Option<OutputCopy>,
    logger: Option<Logger>,
}

/// Opens a raw stream to the guest for each stream of the caller.
///
/// # Errors
/// The VM has ended.
pub(super) async fn connect(vm: &Vm, host: HostStdio) -> Result<(api::Stdio, ProcessStreams), PodError> {
    let mut stdio = api::Stdio { terminal: host.terminal, ..Default::default() };
    let open = async |wanted: bool| match wanted {
        true => vm.open_stream().await.map(Some),
        false => Ok(None),
    };
    // Opened concurrently, because each takes a round trip to the guest.
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
        OutputCopy::to("stdout", stream, sink)
    });
    outputs.stderr = host.stderr.zip(stderr).map(|(sink, (token, stream))| {
        stdio.stderr = token;
        OutputCopy::to("stderr", stream, sink)
    });
    Ok((stdio, ProcessStreams { stdin, terminal: host.terminal, outputs }))
}

impl ProcessStreams {
    /// Takes the stdin of this process in the guest.
    pub(super) fn take_input(
        &mut self,
        agent: &agent::Client,
        container: &str,
        process: ProcessRef,
    ) -> Option<PendingInput> {
        let (source, to_guest) = self.stdin.take()?;
        let (agent, container) = (agent.clone(), container.to_owned());
        Some(PendingInput { source, to_guest, terminal: self.terminal, agent, container, process })
    }
}

impl fmt::Debug for PendingInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingInput")
            .field("source", &self.source)
            .field("container", &self.container)
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

impl PendingInput {
    /// Opens the caller's end.
    ///
    /// # Errors
    /// The errors of open(2).
    pub(super) fn open(&self) -> Result<StdinReader, StdioError> {
        self.source.open()
    }

    /// Starts to copy from the caller's end.
    pub(super) fn start(self, stdin: StdinReader, closed: watch::Receiver<bool>) -> StdinCopy {
        let Self { to_guest, terminal, agent, container, process, .. } = self;
        let (from_guest, to_guest) = tokio::io::split(to_guest);
        StdinCopy::start(stdin, StdinEnd { closed, terminal }, from_guest, to_guest, async move |total| {
            if let Err(error) = agent.end_stdin(&container, &process, total).await {
                // A process that has ended does not need the end of its stdin.
                tracing::debug!(id = container, ?process, "end of stdin not delivered: {error}");
            }
        })
    }
}

impl Outputs {
    /// Drops the output from then on, instead of waiting for its readers.
    pub(super) fn discard(&self) -> DiscardOutput {
        self.stdout.iter().chain(&self.stderr).map(OutputCopy::discard).collect()
    }

    /// Waits until the caller has received all output of the process. The logging program may still be
    /// working on it.
    pub(super) async fn deliver(self, id: &str, ended: &WaitProcessResponse) -> Option<Logger> {
        let finish = async |output: Option<OutputCopy>, bytes| match output {
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

    /// Delivers the output that has arrived from a guest that has ended.
    pub(super) async fn abandon(self) -> Option<Logger> {
        let abandon = async |output: Option<OutputCopy>| {
            if let Some(output) = output {
                output.abandon().await;
            }
        };
        tokio::join!(abandon(self.stdout), abandon(self.stderr));
        self.logger
    }
}
