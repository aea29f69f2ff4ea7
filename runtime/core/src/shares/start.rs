//! Starts a pod's share server, and connects it with the guest.

use std::{
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::Arc,
    time::Duration,
};

use machinen_base::{
    error::chain,
    process::{Child, Stdio},
};
use machinen_protocol::shares::QUEUES;
use machinen_vm::{BoxedStream, Vm};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::UnixStream,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use super::{
    RunningShares, ShareError, ShareGuest,
    jail::{MAX_FILES, jail},
    prepare,
    root::ShareRoot,
    server::{CONTROL, ENTRY_POINT, FIRST_QUEUE},
    sockets as connections,
};

/// Size of the buffer of each stream in each direction, bytes.
const BUFFER: usize = 64 << 10;
/// The longest time between the end of a VM's streams and the end of the VM.
const VM_END: Duration = Duration::from_secs(2);
/// What is kept of the server's messages, bytes.
const MAX_PRINTED: u64 = 4096;

/// A stream of the guest, and the server's end of it.
type Queue = (BoxedStream, UnixStream);

/// A server that is connected with no guest. It serves an empty directory so far.
#[derive(Debug)]
pub(super) struct ShareServer {
    process: Child,
    root: ShareRoot,
    /// Our ends of its streams.
    sockets: Vec<UnixStream>,
    /// Our end of the socket on which it is asked for connections.
    control: Arc<OwnedFd>,
}

impl ShareServer {
    /// Starts the process, and mounts the directory of the volumes for it.
    pub(super) async fn start() -> Result<Self, ShareError> {
        let (sockets, theirs) = sockets().map_err(prepare("make sockets"))?;
        let (control, dialer) = control().map_err(prepare("make sockets"))?;
        let mut spawn = ENTRY_POINT.spawn().jail(jail()).stderr(Stdio::Pipe).fd(dialer, CONTROL);
        for (number, socket) in (FIRST_QUEUE..).zip(theirs) {
            spawn = spawn.fd(socket, number);
        }
        let process = spawn.start().map_err(ShareError::Spawn)?;
        let pid = process.pid();
        allow_many_files(pid);
        let root = spawn_blocking(move || ShareRoot::mount(pid)).await;
        match root.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(root) => Ok(Self { process, root, sockets, control }),
            Err(error) => {
                end(&process).await;
                Err(prepare("mount a directory")(error))
            }
        }
    }

    /// Has the guest mount what the server serves.
    pub(super) async fn connect(self, guest: &ShareGuest<'_>) -> Result<RunningShares, ShareError> {
        let Self { process, root, sockets, control } = self;
        let queues = match mount_in_guest(guest, sockets).await {
            Ok(queues) => queues,
            Err(error) => {
                end(&process).await;
                return Err(error);
            }
        };
        let vm = guest.vm.clone();
        let sockets = {
            let (agent, unclaimed) = (guest.agent.clone(), Arc::clone(guest.unclaimed));
            connections::serve(vm.clone(), agent, unclaimed, control)
        };
        let serving = tokio::spawn(serve(vm.clone(), process, queues, sockets));
        Ok(RunningShares { vm, root: Arc::new(root), serving, next_number: 0 })
    }

    /// Ends the process.
    pub(super) async fn end(self) {
        end(&self.process).await;
    }
}

/// Raises the limit of descriptors of the server, a child that has not been reaped, if this process may do so.
fn allow_many_files(server: u32) {
    let limit = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    let pid = Pid::from_raw(server.cast_signed());
    if let Err(error) = prlimit(pid, Resource::Nofile, limit) {
        tracing::info!(
            "the pod's volumes may have fewer files in use than {MAX_FILES}: cannot raise the limit: {error}"
        );
    }
}

fn sockets() -> io::Result<(Vec<UnixStream>, Vec<OwnedFd>)> {
    let pair = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
    };
    (0..QUEUES).map(|_| pair()).collect::<io::Result<Vec<_>>>().map(|pairs| pairs.into_iter().unzip())
}

/// The two ends of a socket on which the server is asked for connections. Ours does not block.
fn control() -> io::Result<(Arc<OwnedFd>, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((Arc::new(ours.into()), theirs.into()))
}

async fn mount_in_guest(guest: &ShareGuest<'_>, sockets: Vec<UnixStream>) -> Result<Vec<Queue>, ShareError> {
    // A permit stands for the three streams of a process.
    let permits = u32::try_from(QUEUES.div_ceil(3)).expect("it is small");
    let _unclaimed = guest.unclaimed.acquire_many(permits).await.expect("never closed");
    let mut opening = JoinSet::new();
    for socket in sockets {
        let vm = guest.vm.clone();
        opening.spawn(async move { vm.open_stream().await.map(|(token, stream)| (token, (stream, socket))) });
    }
    let (mut tokens, mut queues) = (Vec::new(), Vec::new());
    while let Some(opened) = opening.join_next().await {
        let (token, queue) = opened
            .map_err(io::Error::other)
            .map_err(prepare("open a stream"))?
            .map_err(ShareError::Stream)?;
        tokens.push(token);
        queues.push(queue);
    }
    guest.agent.mount_shares(tokens).await.map_err(ShareError::Guest)?;
    Ok(queues)
}

/// Passes messages on until the VM, a stream or the server ends; then ends the server.
async fn serve(
    vm: Vm,
    mut server: Child,
    queues: Vec<Queue>,
    sockets: impl Future<Output = Result<(), ShareError>> + Send + 'static,
) {
    let mut relays = JoinSet::new();
    let connecting = tokio::spawn(async {
        if let Err(error) = sockets.await {
            tracing::debug!("containers reach no more sockets of the host: {}", chain(&error));
        }
    });
    for (mut stream, mut socket) in queues {
        relays.spawn(
            async move { copy_bidirectional_with_sizes(&mut stream, &mut socket, BUFFER, BUFFER).await },
        );
    }
    let lost = tokio::select! {
        biased;
        _ = vm.exited() => None,
        exit = server.exited() => Some(format!("the server has ended: {exit}")),
        ended = relays.join_next() => Some(match ended {
            Some(Ok(Err(error))) => format!("a stream of the volumes has failed: {error}"),
            _ => "a stream of the volumes has ended".to_owned(),
        }),
    };
    relays.shutdown().await;
    connecting.abort();
    end(&server).await;
    let Some(lost) = lost else { return };
    // The streams of a VM that ends are closed a little earlier.
    if timeout(VM_END, vm.exited()).await.is_ok() {
        return;
    }
    let mut printed = String::new();
    if let Some(stderr) = server.stderr.take() {
        // The server has ended, so this does not wait; what cannot be read is not needed.
        drop(stderr.take(MAX_PRINTED).read_to_string(&mut printed));
    }
    tracing::error!("the pod's volumes are lost: {lost} {}", machinen_base::text::printable(printed.trim()));
}

async fn end(server: &Child) {
    if let Err(error) = server.kill().await {
        tracing::warn!("cannot end the server of the pod's volumes: {}", chain(&error));
    }
}
