//! A process's standard streams: pipes or a terminal on the process's side, raw streams to the host on the
//! other side, and pumps between them.
//!
//! Each pump holds at most one buffer, so a reader that stops makes the writer stop. A control call reports
//! the end of a stream, not its closing: the agent keeps an output stream open until the process is deleted.

mod pump;
mod stdin;
mod terminal;
mod unread;

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, OwnedFd},
};

use machinen_protocol::api;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    unistd::{Gid, Uid, fchown, pipe2},
};
use tokio::net::unix::pipe;

use crate::channel::{Stream, Unclaimed};

pub(crate) use self::{
    pump::pump_out,
    stdin::{Input, Stdin},
    terminal::{Terminal, WindowSize, receive_fd},
    unread::{Pipe, read as read_unread, save as save_unread},
};
use self::{
    pump::{InputSink, OutputSource},
    terminal::ConsoleSocket,
};

/// The raw streams of one process.
#[derive(Debug)]
pub(crate) struct Streams {
    terminal: bool,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// The process's ends of its streams, which the engine passes to it.
#[derive(Debug)]
pub(crate) enum ProcessEnds {
    /// Descriptors 0, 1 and 2.
    Files([OwnedFd; 3]),
    /// The process makes a terminal in its own devpts, and sends the master through this socket.
    Terminal(OwnedFd),
}

/// The agent's ends before the process exists.
#[derive(Debug)]
pub(crate) enum PendingEnds {
    Files(Box<AgentEnds>),
    Terminal { socket: ConsoleSocket, stdin: Option<Stream>, stdout: Option<Stream> },
}

/// The agent's ends of a process's streams.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<(OutputSource, Option<Stream>)>,
    pub(crate) stderr: Option<(OutputSource, Option<Stream>)>,
    pub(crate) terminal: Option<Terminal>,
    /// The pipes that were made for stdin, stdout and stderr.
    pub(crate) pipes: [Option<Pipe>; 3],
    /// Bytes that the process reads from its stdin before all others.
    pub(crate) unread: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("no stream with token {token} is waiting for {name}")]
    NoStream { name: &'static str, token: u64 },
    #[error("cannot make the process's {name}")]
    Make { name: &'static str, source: io::Error },
    #[error("a terminal has no stderr of its own")]
    TerminalStderr,
    #[error("the process has not made its terminal")]
    NoMaster(#[source] Errno),
    #[error("cannot prepare the process's terminal")]
    Terminal(#[source] io::Error),
}

impl ProcessEnds {
    pub(crate) fn into_fds(self) -> Vec<OwnedFd> {
        match self {
            Self::Files(files) => files.into(),
            Self::Terminal(socket) => vec![socket],
        }
    }

    /// The reverse of [`ProcessEnds::into_fds`]; None for other descriptors.
    pub(crate) fn from_fds(fds: Vec<OwnedFd>) -> Option<Self> {
        match <[OwnedFd; 3]>::try_from(fds) {
            Ok(files) => Some(Self::Files(files)),
            Err(fds) => <[OwnedFd; 1]>::try_from(fds).ok().map(|[socket]| Self::Terminal(socket)),
        }
    }
}

impl Streams {
    /// Takes the streams that a request refers to.
    ///
    /// # Errors
    /// A token is not one of an open, unclaimed stream.
    pub(crate) async fn claim(stdio: &api::Stdio, unclaimed: &Unclaimed) -> Result<Self, StdioError> {
        let claim = async |name, token| match token {
            0 => Ok(None),
            token => unclaimed.claim(token).await.map(Some).ok_or(StdioError::NoStream { name, token }),
        };
        // Take all streams even if one is missing: the host uses each token once.
        let stdin = claim("stdin", stdio.stdin).await;
        let stdout = claim("stdout", stdio.stdout).await;
        let stderr = claim("stderr", stdio.stderr).await;
        let (stdin, stdout, stderr) = (stdin?, stdout?, stderr?);
        if stdio.terminal && stderr.is_some() {
            return Err(StdioError::TerminalStderr);
        }
        Ok(Self { terminal: stdio.terminal, stdin, stdout, stderr })
    }

    /// Makes a pipe for every stream and opens /dev/null for the others, or prepares for a terminal. The
    /// process's ends belong to `owner`, so that it can open /dev/stdout and its like. A restored process
    /// that had pipes, which `pipes` says of stdin, stdout and stderr, gets pipes even without a stream.
    ///
    /// # Errors
    /// Those of pipe(2) and socketpair(2).
    pub(crate) fn ends(self, owner: Uid, pipes: [bool; 3]) -> Result<(ProcessEnds, PendingEnds), StdioError> {
        if self.terminal {
            let (socket, theirs) = ConsoleSocket::pair()?;
            let pending = PendingEnds::Terminal { socket, stdin: self.stdin, stdout: self.stdout };
            return Ok((ProcessEnds::Terminal(theirs), pending));
        }
        let [stdin_pipe, stdout_pipe, stderr_pipe] = pipes;
        let (stdin_end, stdin) = input(self.stdin, owner, stdin_pipe)?;
        let (stdout_end, stdout) = output("stdout", self.stdout, owner, stdout_pipe)?;
        let (stderr_end, stderr) = output("stderr", self.stderr, owner, stderr_pipe)?;
        let made = |name, end: &OwnedFd, is_pipe: bool| match is_pipe {
            true => Pipe::of(end).map(Some).map_err(failed(name)),
            false => Ok(None),
        };
        let pipes = [
            made("stdin", &stdin_end, stdin.is_some())?,
            made("stdout", &stdout_end, stdout.is_some())?,
            made("stderr", &stderr_end, stderr.is_some())?,
        ];
        let ends = AgentEnds { stdin, stdout, stderr, terminal: None, pipes, unread: Vec::new() };
        Ok((ProcessEnds::Files([stdin_end, stdout_end, stderr_end]), PendingEnds::Files(Box::new(ends))))
    }
}

impl PendingEnds {
    /// Receives the terminal, if the process has one.
    ///
    /// # Errors
    /// The process has not sent its terminal.
    pub(crate) fn connect(self) -> Result<AgentEnds, StdioError> {
        match self {
            Self::Files(ends) => Ok(*ends),
            Self::Terminal { socket, stdin, stdout } => {
                let (terminal, master) = socket.receive()?;
                Ok(AgentEnds {
                    stdin: stdin.map(|stream| Input {
                        stream: Some(stream),
                        sink: InputSink::Terminal(master.clone()),
                    }),
                    // Read even without a stream, or the process would block forever.
                    stdout: Some((OutputSource::Terminal(master), stdout)),
                    stderr: None,
                    terminal: Some(terminal),
                    pipes: [None, None, None],
                    unread: Vec::new(),
                })
            }
        }
    }
}

type Output = (OwnedFd, Option<(OutputSource, Option<Stream>)>);

/// Makes stdin. A restored pipe without a stream ends after the bytes that were carried over.
fn input(
    stream: Option<Stream>,
    owner: Uid,
    always_pipe: bool,
) -> Result<(OwnedFd, Option<Input>), StdioError> {
    if stream.is_none() && !always_pipe {
        return Ok((null("stdin")?, None));
    }
    let (read, write) = pipe("stdin")?;
    own(&read, owner, "stdin")?;
    let sink = InputSink::Pipe(pipe::Sender::from_owned_fd(write).map_err(failed("stdin"))?);
    Ok((read, Some(Input { stream, sink })))
}

fn output(
    name: &'static str,
    stream: Option<Stream>,
    owner: Uid,
    always_pipe: bool,
) -> Result<Output, StdioError> {
    if stream.is_none() && !always_pipe {
        return Ok((null(name)?, None));
    }
    let (read, write) = pipe(name)?;
    own(&write, owner, name)?;
    // A failure is ignored: a smaller pipe is only slower.
    let _ = rustix::pipe::fcntl_setpipe_size(&read, pump::BUFFER);
    let read = pipe::Receiver::from_owned_fd(read).map_err(failed(name))?;
    Ok((write, Some((OutputSource::Pipe(read), stream))))
}

fn pipe(name: &'static str) -> Result<(OwnedFd, OwnedFd), StdioError> {
    pipe2(OFlag::O_CLOEXEC).map_err(|err| failed(name)(err.into()))
}

fn own(end: &OwnedFd, owner: Uid, name: &'static str) -> Result<(), StdioError> {
    fchown(end.as_fd(), Some(owner), None::<Gid>).map_err(|err| failed(name)(err.into()))
}

fn null(name: &'static str) -> Result<OwnedFd, StdioError> {
    OpenOptions::new().read(true).write(true).open("/dev/null").map(Into::into).map_err(failed(name))
}

fn failed(name: &'static str) -> impl FnOnce(io::Error) -> StdioError {
    move |source| StdioError::Make { name, source }
}
