//! `machinen attach`: connects this terminal with a container that `machinen boot --detach` has started.

use std::{
    io::{self, IsTerminal as _, Read as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::Path,
    process::ExitCode,
    thread,
};

use clap::Args;
use machinen::fs::FileError;
use rustix::fs::{Mode, OFlags};
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::error::EverydayError;
use crate::{
    boot::keeper::{Frame, FrameKind, SOCKET, read_frame},
    find::{self, FoundContainer, ManagersVerb},
    oci::{GlobalArgs, OciError, console::RawTerminal},
};

/// Arguments of `machinen attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Keys that detach: characters or ctrl-LETTER, with commas between them
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Do not connect stdin
    #[arg(long)]
    no_stdin: bool,
    /// Id or name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Resolves with the container's exit status, or with 0 when the user has detached.
///
/// # Errors
/// The container has no streams to attach to.
pub(super) async fn run(global: &GlobalArgs, args: &AttachArgs) -> Result<ExitCode, EverydayError> {
    let keys = DetachKeys::parse(&args.detach_keys)?;
    let container = find::one(global, &args.container).await?;
    if !container.bundle.join(SOCKET).exists() {
        let instead = container.instead(ManagersVerb::Attach);
        return Err(EverydayError::NotAttachable { id: container.id, instead });
    }
    let mut typed = if args.no_stdin { Typed::nothing() } else { Typed::of_stdin() };
    match converse(connect(&container)?, keys, &mut typed).await? {
        AttachEnd::Ended(status) => Ok(crate::oci::foreground::exit_code(status)),
        AttachEnd::Detached => {
            print(&mut io::stderr(), b"\r\ndetached\r\n")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// How a connection with a container has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttachEnd {
    /// By the keys of the user.
    Detached,
    /// With the container, which has this exit status.
    Ended(u32),
}

/// What is typed at this terminal.
pub(super) struct Typed {
    /// None: nothing more comes, or nothing is to be read.
    receiver: Option<mpsc::Receiver<Vec<u8>>>,
    /// What was taken and not used.
    pushed: Vec<u8>,
}

impl Typed {
    pub(super) fn nothing() -> Self {
        Self { receiver: None, pushed: Vec::new() }
    }

    /// Begins to read stdin, which must be done once.
    pub(super) fn of_stdin() -> Self {
        Self::of(input())
    }

    pub(super) fn of(receiver: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { receiver: Some(receiver), pushed: Vec::new() }
    }

    /// Whether more may come.
    pub(super) fn is_open(&self) -> bool {
        self.receiver.is_some() || !self.pushed.is_empty()
    }

    /// What was typed next; empty at the end, and after that it does not resolve.
    pub(super) async fn next(&mut self) -> Vec<u8> {
        if !self.pushed.is_empty() {
            return std::mem::take(&mut self.pushed);
        }
        let Some(receiver) = &mut self.receiver else { return std::future::pending().await };
        let bytes = receiver.recv().await.unwrap_or_default();
        if bytes.is_empty() {
            self.receiver = None;
        }
        bytes
    }

    /// Makes `bytes` the next ones.
    pub(super) fn push_back(&mut self, bytes: Vec<u8>) {
        self.pushed.splice(0..0, bytes);
    }
}

/// Connects to the process that holds the streams of a container.
///
/// # Errors
/// The container has ended, or the process cannot be reached.
pub(super) fn connect(container: &FoundContainer) -> Result<UnixStream, EverydayError> {
    dial(&container.bundle).map_err(|error| match error.kind() {
        // The keeper ends with the container.
        io::ErrorKind::ConnectionRefused => EverydayError::Ended { id: container.id.clone() },
        _ => FileError::new("connect to", container.bundle.join(SOCKET), error).into(),
    })
}

fn dial(bundle: &Path) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir: OwnedFd = rustix::fs::open(bundle, flags, Mode::empty())?;
    let stream = StdUnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Relays between this terminal and a container until one of them ends it.
///
/// # Errors
/// The connection or the terminal fails.
pub(super) async fn converse(
    stream: UnixStream,
    mut keys: DetachKeys,
    typed: &mut Typed,
) -> Result<AttachEnd, EverydayError> {
    let lost = |source| EverydayError::Attached { source };
    let (from, mut to) = stream.into_split();
    let mut frames = frames(from);
    let hello = frames.recv().await.transpose().map_err(lost)?;
    let has_terminal = hello.is_some_and(|frame| frame.content == [1]);
    let is_terminal = io::stdin().is_terminal();
    let _raw = (has_terminal && is_terminal && typed.is_open())
        .then(RawTerminal::enter)
        .transpose()
        .map_err(OciError::io("use the terminal"))?;
    let mut sizes = signal(SignalKind::window_change()).map_err(OciError::io("watch signals"))?;
    send_size(&mut to).await;
    loop {
        tokio::select! {
            frame = frames.recv() => match frame.transpose().map_err(lost)? {
                Some(Frame { kind: FrameKind::Stdout, content }) => print(&mut io::stdout(), &content)?,
                Some(Frame { kind: FrameKind::Stderr, content }) => print(&mut io::stderr(), &content)?,
                Some(Frame { kind: FrameKind::Exit, content }) => {
                    let status = content.last_chunk().map_or(u32::MAX, |bytes| u32::from_be_bytes(*bytes));
                    return Ok(AttachEnd::Ended(status));
                }
                Some(_) => {}
                None => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            },
            bytes = typed.next() => {
                let Some(passed) = keys.pass(&bytes) else {
                    // For what comes after this container.
                    typed.push_back(keys.rest(&bytes));
                    return Ok(AttachEnd::Detached);
                };
                if bytes.is_empty() || !passed.is_empty() {
                    to.write_all(&Frame::new(FrameKind::Stdin, &passed).encode()).await.map_err(lost)?;
                }
            }
            _ = sizes.recv() => send_size(&mut to).await,
        }
    }
}

/// What the keeper sends. A task of its own reads it, since a message that was read in part must not be forgotten.
fn frames(mut from: OwnedReadHalf) -> mpsc::Receiver<io::Result<Frame>> {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        while let Some(frame) = read_frame(&mut from).await.transpose() {
            let failed = frame.is_err();
            if sender.send(frame).await.is_err() || failed {
                return;
            }
        }
    });
    receiver
}

/// What is typed; empty at the end. Read on a thread, which blocks in read(2) until this process ends.
fn input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count) = io::stdin().lock().read(&mut buffer) {
            if sender.blocking_send(buffer[..count].to_vec()).is_err() || count == 0 {
                return;
            }
        }
    });
    receiver
}

async fn send_size(to: &mut OwnedWriteHalf) {
    let Ok(size) = rustix::termios::tcgetwinsize(io::stdin()) else { return };
    let content = [size.ws_col.to_be_bytes(), size.ws_row.to_be_bytes()].concat();
    // A connection that is lost is noticed by the reader.
    let _ = to.write_all(&Frame::new(FrameKind::Size, &content).encode()).await;
}

pub(super) fn print(to: &mut impl io::Write, bytes: &[u8]) -> Result<(), EverydayError> {
    let written = to.write_all(bytes).and_then(|()| to.flush());
    written.map_err(|source| EverydayError::File(FileError::new("write to", "the terminal", source)))
}

/// Finds a sequence of keys in what is typed.
#[derive(Debug)]
pub(super) struct DetachKeys {
    keys: Vec<u8>,
    /// How many of them were typed, and are held back.
    typed: usize,
    /// How many bytes followed in the call that has completed the sequence.
    after: usize,
}

impl DetachKeys {
    /// # Errors
    /// The keys are not understood.
    pub(super) fn parse(text: &str) -> Result<Self, EverydayError> {
        let key = |key: &str| match (key.strip_prefix("ctrl-").map(str::as_bytes), key.as_bytes()) {
            (Some([letter @ (b'a'..=b'z' | b'@' | b'['..=b'_')]), _) => {
                Some(letter.to_ascii_uppercase() & 0x1f)
            }
            (None, [key]) => Some(*key),
            _ => None,
        };
        let keys = text.split(',').map(key).collect::<Option<Vec<_>>>();
        let keys = keys.ok_or_else(|| EverydayError::DetachKeys { keys: text.to_owned() })?;
        Ok(Self { keys, typed: 0, after: 0 })
    }

    /// What goes to the container; None: the sequence is complete.
    fn pass(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::new();
        for (at, byte) in bytes.iter().enumerate() {
            if *byte == self.keys[self.typed] {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    self.after = bytes.len() - at - 1;
                    return None;
                }
                continue;
            }
            passed.extend_from_slice(&self.keys[..self.typed]);
            self.typed = usize::from(*byte == self.keys[0]);
            if self.typed == 0 {
                passed.push(*byte);
            }
        }
        Some(passed)
    }

    /// What follows the complete sequence in `bytes`, which `pass` has got.
    fn rest(&self, bytes: &[u8]) -> Vec<u8> {
        bytes[bytes.len() - self.after..].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_detach_and_other_keys_pass() {
        let mut keys = DetachKeys::parse("ctrl-p,ctrl-q").unwrap();
        assert_eq!(keys.pass(b"ls\r").unwrap(), b"ls\r");
        assert_eq!(keys.pass(b"a\x10").unwrap(), b"a");
        assert_eq!(keys.pass(b"b").unwrap(), b"\x10b");
        assert_eq!(keys.pass(b"\x10\x10").unwrap(), b"\x10");
        assert_eq!(keys.pass(b"\x11"), None);
        let mut twice = DetachKeys::parse("ctrl-],ctrl-]").unwrap();
        assert_eq!(twice.pass(b"x\x1d\x1dab"), None);
        assert_eq!(twice.rest(b"x\x1d\x1dab"), b"ab");
        for odd in ["", "ctrl-", "ctrl-1", "ab", "a,,b"] {
            assert!(DetachKeys::parse(odd).is_err(), "{odd:?}");
        }
    }
}
