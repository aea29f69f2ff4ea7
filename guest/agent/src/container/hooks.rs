//! Runs the startContainer hooks of a container: in the container, while its init waits for its start.
//!
//! Each is a process that is added to the container, as by exec. When one fails, its caller kills the container with
//! everything that hooks have started in it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    time::Duration,
};

use machinen_protocol::{
    error::{ErrorKind, HasKind},
    tail::OutputTail,
};
use nix::{
    fcntl::OFlag,
    sys::memfd::{MFdFlags, memfd_create},
    unistd::pipe2,
};
use procfs::{ProcError, process::Process};
use serde_json::Value;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::Container;
use crate::{
    context::Context,
    engine::{EngineError, Executed, PreparedHook},
    stdio::ProcessEnds,
};

/// Bytes of a hook's errors that are reported. The host shows a limited part of a message.
const REPORTED: usize = 640;

/// The hooks of one container.
#[derive(Debug)]
pub(super) struct StartHooks {
    pub(super) hooks: Vec<PreparedHook>,
    /// The host's description of the container.
    pub(super) state: Vec<u8>,
}

/// Why a container was not started.
#[derive(Debug, thiserror::Error)]
#[error("the startContainer hook {} ({}) failed", .number + 1, .path.display())]
pub(crate) struct StartHookError {
    /// The place in the list, from 0.
    number: usize,
    path: PathBuf,
    source: HookFailure,
}

#[derive(Debug, thiserror::Error)]
enum HookFailure {
    #[error("the host's state of the container cannot be parsed")]
    State(#[source] serde_json::Error),
    #[error("the container's init cannot be examined")]
    Init(#[source] ProcError),
    #[error("cannot connect its standard streams")]
    Streams(#[source] io::Error),
    #[error(transparent)]
    Start(EngineError),
    #[error("the container has ended meanwhile")]
    InitEnded,
    #[error("its exit was lost")]
    Lost,
    #[error("it exited with status {status}{}", after_colon(.stderr))]
    Exit { status: u32, stderr: String },
    #[error("it was killed, because it has not ended within {limit:?}{}", after_colon(.stderr))]
    Timeout { limit: Duration, stderr: String },
}

fn after_colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

impl HasKind for StartHookError {
    fn kind(&self) -> ErrorKind {
        match self.source {
            HookFailure::Timeout { .. } => ErrorKind::DeadlineExceeded,
            HookFailure::InitEnded => ErrorKind::NotFound,
            _ => ErrorKind::Internal,
        }
    }
}

impl Container {
    /// Runs the hooks in their order.
    ///
    /// # Errors
    /// The first hook that fails. Its processes are still there, and the hooks after it have not run.
    pub(super) async fn run_start_hooks(&self, context: &Context) -> Result<(), StartHookError> {
        for (number, hook) in self.start_hooks.hooks.iter().enumerate() {
            let run = self.run_start_hook(context, hook).await;
            run.map_err(|source| StartHookError { number, path: hook.path.clone(), source })?;
        }
        Ok(())
    }

    async fn run_start_hook(&self, context: &Context, hook: &PreparedHook) -> Result<(), HookFailure> {
        let init = self.init.pid();
        let state = self.state_for_hooks()?;
        let (ends, mut errors) = streams(&state).map_err(HookFailure::Streams)?;
        let executed =
            context.engine.exec(&context.reaper, init, &self.join_context, &hook.process, ends).await;
        let Executed { exit, .. } = executed.map_err(HookFailure::Start)?;
        let mut tail = OutputTail::new(REPORTED);
        let ended = timeout(hook.patience, async {
            tokio::select! {
                biased;
                status = exit => status.map_err(|_| HookFailure::Lost),
                () = self.init.exited() => Err(HookFailure::InitEnded),
                error = follow(&mut errors, &mut tail) => Err(HookFailure::Streams(error)),
            }
        })
        .await;
        match ended {
            Ok(Ok(status)) if status.code() == 0 => Ok(()),
            Ok(Ok(status)) => {
                take_rest(&errors, &mut tail);
                Err(HookFailure::Exit { status: status.code(), stderr: tail.text() })
            }
            Ok(Err(failure)) => Err(failure),
            Err(_) => {
                take_rest(&errors, &mut tail);
                Err(HookFailure::Timeout { limit: hook.patience, stderr: tail.text() })
            }
        }
    }

    /// The host's state with the pid that the init has in its own pid namespace, as runc writes it.
    fn state_for_hooks(&self) -> Result<Vec<u8>, HookFailure> {
        let mut state: Value = serde_json::from_slice(&self.start_hooks.state).map_err(HookFailure::State)?;
        let init = self.init.pid().as_raw();
        let status = Process::new(init).and_then(|process| process.status()).map_err(HookFailure::Init)?;
        state["pid"] = status.nspid.and_then(|pids| pids.last().copied()).unwrap_or(init).into();
        serde_json::to_vec(&state).map_err(HookFailure::State)
    }
}

/// A file with the state as stdin, /dev/null as stdout, and a pipe as stderr.
fn streams(state: &[u8]) -> io::Result<(ProcessEnds, pipe::Receiver)> {
    let mut stdin = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
    stdin.write_all(state)?;
    stdin.rewind()?;
    let stdout = OpenOptions::new().write(true).open("/dev/null")?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let ends: [OwnedFd; 3] = [stdin.into(), stdout.into(), write];
    Ok((ProcessEnds::Files(ends), pipe::Receiver::from_owned_fd(read)?))
}

/// Reads all that is written. Returns only an error of read(2): a process that the hook has left behind may keep the
/// pipe open, so the end of the pipe means nothing.
async fn follow(pipe: &mut pipe::Receiver, tail: &mut OutputTail) -> io::Error {
    let mut buffer = [0; REPORTED];
    loop {
        match pipe.read(&mut buffer).await {
            Ok(0) => return std::future::pending().await,
            Ok(length) => tail.push(&buffer[..length]),
            Err(error) => return error,
        }
    }
}

/// Reads what is in the pipe by now, but no more than a pipe can hold.
fn take_rest(pipe: &pipe::Receiver, tail: &mut OutputTail) {
    const MOST_READS: usize = 1 << 10;
    let mut buffer = [0; REPORTED];
    for _ in 0..MOST_READS {
        match nix::unistd::read(pipe, &mut buffer) {
            Ok(length) if length > 0 => tail.push(&buffer[..length]),
            _ => return,
        }
    }
}
