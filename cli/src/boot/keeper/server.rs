//! What a keeper does: it reads the streams to their ends, writes the log, serves clients, and learns the exit status.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read as _, Write as _},
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use machinen::error::chain;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixStream,
    sync::{broadcast, oneshot},
    task::JoinSet,
    time::timeout,
};

use super::{
    KeeperParams, LOG,
    log::OutputLog,
    protocol::{Frame, FrameKind, read_frame},
};
use crate::oci::{OciError, client::MonitorClient, create::destroy, state::StateDir};

/// The end of the output that a client gets when it attaches, bytes.
const REPLAYED: usize = 64 << 10;
/// Messages that a slow client may be behind; what it misses then, it does not get.
const BEHIND: usize = 256;
/// The exit status if the monitor is lost, as after SIGKILL.
const LOST: u32 = 137;
/// How long clients may take to read the end.
const LAST_READ: Duration = Duration::from_secs(2);

/// The descriptors of a keeper.
pub(super) struct Inherited {
    pub(super) listener: UnixListener,
    pub(super) orders: File,
    /// The terminal, or the pipe of stdout.
    pub(super) out: File,
    pub(super) err: Option<File>,
    pub(super) input: Option<File>,
}

/// What the threads that read, and the clients, share.
struct Shared {
    output: Mutex<Output>,
    frames: broadcast::Sender<Frame>,
    /// The pipe to the standard input of the container. None: the input has ended, or the container has no input.
    input: Mutex<Option<File>>,
    /// The terminal.
    terminal: Option<File>,
}

struct Output {
    log: Option<OutputLog>,
    replayed: VecDeque<u8>,
}

impl Shared {
    /// A stream has brought something.
    fn push(&self, kind: FrameKind, bytes: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = if kind == FrameKind::Stderr { "stderr" } else { "stdout" };
        if let Some(log) = &mut output.log
            && let Err(error) = log.append(stream, bytes)
        {
            // The container must not stop because a disk is full.
            tracing::error!("cannot write the container's log: {error}");
            output.log = None;
        }
        output.replayed.extend(bytes);
        let excess = output.replayed.len().saturating_sub(REPLAYED);
        output.replayed.drain(..excess);
        // No client is no error.
        let _ = self.frames.send(Frame::new(kind, bytes));
    }

    /// What a client gets first, and then what follows without a gap.
    fn subscribe(&self) -> (Vec<u8>, broadcast::Receiver<Frame>) {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        (output.replayed.iter().copied().collect(), self.frames.subscribe())
    }

    /// Input of a client. Blocks until the container has read it.
    fn write(&self, bytes: &[u8]) {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = match input.as_mut() {
            Some(file) => bytes.is_empty() && self.terminal.is_none() || file.write_all(bytes).is_err(),
            None => false,
        };
        if ended {
            *input = None;
        }
    }

    fn resize(&self, content: &[u8]) {
        let &[a, b, c, d] = content else { return };
        let (ws_col, ws_row) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        if let Some(terminal) = &self.terminal {
            // A terminal that is closed needs no size.
            let _ = tcsetwinsize(terminal, Winsize { ws_col, ws_row, ws_xpixel: 0, ws_ypixel: 0 });
        }
    }
}

/// # Errors
/// The keeper cannot begin, or the container cannot be deleted at its end.
pub(super) fn run(params: KeeperParams, inherited: Inherited) -> Result<(), OciError> {
    let Inherited { listener, mut orders, out, err, input } = inherited;
    let log = OutputLog::open(&params.bundle.join(LOG)).map_err(OciError::io("make the container's log"))?;
    let again = |file: &File| file.try_clone().map_err(OciError::io("duplicate the terminal"));
    let terminal = params.terminal.then(|| again(&out)).transpose()?;
    let input = match &terminal {
        Some(terminal) => Some(again(terminal)?),
        None => input,
    };
    let shared = Arc::new(Shared {
        output: Mutex::new(Output { log: Some(log), replayed: VecDeque::new() }),
        frames: broadcast::channel(BEHIND).0,
        input: Mutex::new(input),
        terminal,
    });
    let mut readers = vec![reader(&shared, FrameKind::Stdout, out)];
    readers.extend(err.map(|err| reader(&shared, FrameKind::Stderr, err)));
    // Ends without an order if the container was not started.
    let mut order = [0; 3];
    if orders.read_exact(&mut order).is_err() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(OciError::io("start the event loop"))?;
    let kept = runtime.block_on(keep(&params, &shared, listener, readers));
    // A thread may wait until the container reads its input.
    runtime.shutdown_background();
    kept
}

/// Reads a stream to its end on a thread of its own.
fn reader(shared: &Arc<Shared>, kind: FrameKind, mut from: File) -> oneshot::Receiver<()> {
    let (ended, has_ended) = oneshot::channel();
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(count @ 1..) => shared.push(kind, &buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The end of a terminal is an error (EIO).
                Ok(_) | Err(_) => break,
            }
        }
        let _ = ended.send(());
    });
    has_ended
}

async fn keep(
    params: &KeeperParams,
    shared: &Arc<Shared>,
    listener: UnixListener,
    readers: Vec<oneshot::Receiver<()>>,
) -> Result<(), OciError> {
    let failed = || OciError::io("listen for clients");
    listener.set_nonblocking(true).map_err(failed())?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed())?;
    let state = StateDir::find(&params.root, &params.id)?;
    let mut ended = std::pin::pin!(async {
        let status = status(&state).await;
        for reader in readers {
            // A reader that is gone has ended.
            let _ = reader.await;
        }
        status
    });
    let mut clients = JoinSet::new();
    let status = loop {
        tokio::select! {
            status = &mut ended => break status,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => _ = clients.spawn(serve(Arc::clone(shared), stream)),
                Err(error) => tracing::warn!("a client was not accepted: {error}"),
            },
            Some(_) = clients.join_next() => {}
        }
    };
    let _ = shared.frames.send(Frame::new(FrameKind::Exit, &status.to_be_bytes()));
    let _ = timeout(LAST_READ, async { while clients.join_next().await.is_some() {} }).await;
    match params.remove {
        true => destroy(&params.root, &state).await,
        false => Ok(()),
    }
}

/// The exit status of the container, when it has ended.
async fn status(state: &StateDir) -> u32 {
    let waited = async { MonitorClient::running(state).await?.wait("").await }.await;
    waited.unwrap_or_else(|error| {
        tracing::debug!("the exit status is not known: {}", chain(&error));
        LOST
    })
}

/// Serves one client until it goes away or has the exit status.
async fn serve(shared: Arc<Shared>, stream: UnixStream) {
    let (mut from, mut to) = stream.into_split();
    let (replayed, mut frames) = shared.subscribe();
    let first = [
        Frame::new(FrameKind::Hello, &[u8::from(shared.terminal.is_some())]),
        Frame::new(FrameKind::Stdout, &replayed),
    ];
    for frame in first {
        if to.write_all(&frame.encode()).await.is_err() {
            return;
        }
    }
    let writer = async {
        loop {
            match frames.recv().await {
                Ok(frame) => {
                    if to.write_all(&frame.encode()).await.is_err() || frame.kind == FrameKind::Exit {
                        return;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    };
    let reader = async {
        while let Ok(Some(frame)) = read_frame(&mut from).await {
            match frame.kind {
                FrameKind::Stdin => {
                    let shared = Arc::clone(&shared);
                    // One after the other, so that the order stays.
                    let _ = tokio::task::spawn_blocking(move || shared.write(&frame.content)).await;
                }
                FrameKind::Size => shared.resize(&frame.content),
                _ => return,
            }
        }
    };
    tokio::select! {
        () = writer => {}
        () = reader => {}
    }
}
