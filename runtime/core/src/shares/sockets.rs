//! Connections of a pod's containers to UNIX sockets of the host that are in their volumes.
//!
//! ```text
//!   agent ──raw stream: DialHeader──> this process ──DialHeader──> share server ──connect(2)──> the host's process
//!         <═══════frames═══════════>              <──connection──
//! ```
//! The share server chooses and connects, because it reaches nothing but the volumes. This process relays, so the server
//! sees nothing of what is sent.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::Arc,
    time::Duration,
};

use machinen_base::sys::socket::{receive_with_fd, send_with_fd};
use machinen_protocol::sockets::{DialHeader, MAX_CONNECTIONS};
use machinen_vm::{BoxedStream, Vm, agent};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::UnixStream,
    sync::Semaphore,
    time::timeout,
};

use super::{ShareError, dial::ANSWER};
use crate::network::localhost::{CLOSED_WITHIN, relay};

/// How long the server may take to connect.
const CONNECTED_WITHIN: Duration = Duration::from_secs(25);

/// Serves connections until the guest or the server ends: always with one stream that the guest may use next.
///
/// # Errors
/// No stream can be given to the guest.
pub(super) async fn serve(
    vm: Vm,
    agent: agent::Client,
    unclaimed: Arc<Semaphore>,
    control: Arc<OwnedFd>,
) -> Result<(), ShareError> {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let permit = Arc::clone(&connections).acquire_owned().await.expect("never closed");
        let mut stream = {
            let _unclaimed = unclaimed.acquire().await.expect("never closed");
            let (token, stream) = vm.open_stream().await.map_err(ShareError::Stream)?;
            agent.offer_socket_stream(token).await.map_err(ShareError::Guest)?;
            stream
        };
        let mut header = [0; DialHeader::SIZE];
        // The guest ends a stream only with its own end, or in the middle of a message.
        if stream.read_exact(&mut header).await.is_err() {
            return Ok(());
        }
        let control = Arc::clone(&control);
        tokio::spawn(async move {
            if let Err(error) = connect(stream, header, &control).await {
                tracing::debug!("a connection of a container to a socket of the host has ended: {error}");
            }
            drop(permit);
        });
    }
}

async fn connect(
    mut stream: BoxedStream,
    header: [u8; DialHeader::SIZE],
    control: &OwnedFd,
) -> io::Result<()> {
    let dialed = timeout(CONNECTED_WITHIN, dial(header, control)).await;
    let (errno, socket) = match dialed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(socket) => (0, Some(socket)),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), None),
    };
    stream.write_i32(errno).await?;
    stream.flush().await?;
    match socket {
        Some(mut socket) => {
            let (from, to) = socket.split();
            relay(from, to, stream).await
        }
        // The guest closes the stream when it has the answer.
        None => drain(stream).await,
    }
}

async fn drain(mut stream: BoxedStream) -> io::Result<()> {
    drop(timeout(CLOSED_WITHIN, stream.read_u8()).await);
    Ok(())
}

/// Has the server connect.
async fn dial(header: [u8; DialHeader::SIZE], control: &OwnedFd) -> io::Result<UnixStream> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let ours = UnixStream::from_std(ours)?;
    // The control socket does not block: a server that takes nothing any more makes this fail.
    if send_with_fd(control.as_fd(), &header, Some(&OwnedFd::from(theirs)))? != header.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut answer = [0; ANSWER];
    let received = ours.async_io(Interest::READABLE, || receive_with_fd(ours.as_fd(), &mut answer)).await?;
    match (received, i32::from_ne_bytes(answer)) {
        ((ANSWER, Some(connection)), 0) => {
            let connection = StdUnixStream::from(connection);
            connection.set_nonblocking(true)?;
            UnixStream::from_std(connection)
        }
        ((ANSWER, None), errno @ 1..) => Err(io::Error::from_raw_os_error(errno)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
