//! A process's standard streams: pipes or a terminal on its side, raw streams to the host on the other, and what
//! pumps between.
//!
//! Each pump holds one buffer at most, so a reader that stops makes the writer stop. The end of a stream is told
//! by the control channel, never by closing: the agent keeps an output stream open until its process is deleted.

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
    pump::{Sink, Source},
    terminal::ConsoleSocket,
};

/// The streams of one process, claimed.
#[derive(Debug)]
pub(crate) struct Streams {
    terminal: bool,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

/// What the engine gives to the process.
#[derive(Debug)]
pub(crate) enum ProcessEnds {
    /// Its 0, 1 and 2.
    Files([OwnedFd; 3]),
    /// It makes a terminal in its own devpts, and sends the master through this socket.
    Terminal(OwnedFd),
}

/// What the agent keeps until the process is there.
#[derive(Debug)]
pub(crate) enum Pending {
    Files(Box<AgentEnds>),
    Terminal { socket: ConsoleSocket, stdin: Option<Stream>, stdout: Option<Stream> },
}

/// The agent's ends of everything.
#[derive(Debug)]
pub(crate) struct AgentEnds {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<(Source, Option<Stream>)>,
    pub(crate) stderr: Option<(Source, Option<Stream>)>,
    pub(crate) terminal: Option<Terminal>,
    /// Those that were made for stdin, stdout and stderr.
    pub(crate) pipes: [Option<Pipe>; 3],
    /// What the process finds in its stdin before all else.
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

    /// The reverse of [`ProcessEnds::into_fds`]; None when that has not made them.
    pub(crate) fn from_fds(fds: Vec<OwnedFd>) -> Option<Self> {
        match <[OwnedFd; 3]>::try_from(fds) {
            Ok(files) => Some(Self::Files(files)),
            Err(fds) => <[OwnedFd; 1]>::try_from(fds).ok().map(|[socket]| Self::Terminal(socket)),
        }
    }
}

impl Streams {
    /// # Errors
    /// A token is not one of an open, unclaimed stream.
    pub(crate) async fn claim(stdio: &api::Stdio, unclaimed: &Unclaimed) -> Result<Self, StdioError> {
        let claim = async |name, token| match token {
            0 => Ok(None),
            token => unclaimed.claim(token).await.map(Some).ok_or(StdioError::NoStream { name, token }),
        };
        // All are taken even if one is missing: the host gives a token once.
        let stdin = claim("stdin", stdio.stdin).await;
        let stdout = claim("stdout", stdio.stdout).await;
        let stderr = claim("stderr", stdio.stderr).await;
        let (stdin, stdout, stderr) = (stdin?, stdout?, stderr?);
        if stdio.terminal && stderr.is_some() {
            return Err(StdioError::TerminalStderr);
        }
        Ok(Self { terminal: stdio.terminal, stdin, stdout, stderr })
    }

    /// Makes a pipe for every stream, and /dev/null for the others; or the way on which a terminal will come. The
    /// process's ends belong to `owner`, so that it can open /dev/stdout and its like. A process that has had pipes, which
    /// `pipes` says of stdin, stdout and stderr, gets pipes even where there is no stream.
    ///
    /// # Errors
    /// Those of pipe(2) and socketpair(2).
    pub(crate) fn ends(self, owner: Uid, pipes: [bool; 3]) -> Result<(ProcessEnds, Pending), StdioError> {
        if self.terminal {
            let (socket, theirs) = ConsoleSocket::pair()?;
            let pending = Pending::Terminal { socket, stdin: self.stdin, stdout: self.stdout };
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
        Ok((ProcessEnds::Files([stdin_end, stdout_end, stderr_end]), Pending::Files(Box::new(ends))))
    }
}

impl Pending {
    /// Takes the terminal over, if there is to be one.
    ///
    /// # Errors
    /// The process has not sent its terminal.
    pub(crate) fn connect(self) -> Result<AgentEnds, StdioError> {
        match self {
            Self::Files(ends) => Ok(*ends),
            Self::Terminal { socket, stdin, stdout } => {
                let (terminal, master) = socket.receive()?;
                Ok(AgentEnds {
                    stdin: stdin
                        .map(|stream| Input { stream: Some(stream), sink: Sink::Terminal(master.clone()) }),
                    // Read even if nobody listens, or the process would wait for ever.
                    stdout: Some((Source::Terminal(master), stdout)),
                    stderr: None,
                    terminal: Some(terminal),
                    pipes: [None, None, None],
                    unread: Vec::new(),
                })
            }
        }
    }
}

type Output = (OwnedFd, Option<(Source, Option<Stream>)>);

/// A pipe that was there before is at its end when it has what was carried over, if nothing else comes.
fn input(
    stream: Option<Stream>,
    owner: Uid,
    pipe_anyhow: bool,
) -> Result<(OwnedFd, Option<Input>), StdioError> {
    if stream.is_none() && !pipe_anyhow {
        return Ok((null("stdin")?, None));
    }
    let (read, write) = pipe("stdin")?;
    own(&read, owner, "stdin")?;
    let sink = Sink::Pipe(pipe::Sender::from_owned_fd(write).map_err(failed("stdin"))?);
    Ok((read, Some(Input { stream, sink })))
}

fn output(
    name: &'static str,
    stream: Option<Stream>,
    owner: Uid,
    pipe_anyhow: bool,
) -> Result<Output, StdioError> {
    if stream.is_none() && !pipe_anyhow {
        return Ok((null(name)?, None));
    }
    let (read, write) = pipe(name)?;
    own(&write, owner, name)?;
    // A smaller pipe is only slower.
    let _ = rustix::pipe::fcntl_setpipe_size(&read, pump::BUFFER);
    let read = pipe::Receiver::from_owned_fd(read).map_err(failed(name))?;
    Ok((write, Some((Source::Pipe(read), stream))))
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
