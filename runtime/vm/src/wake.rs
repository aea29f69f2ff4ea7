//! The wake port: a template's agent reports on it that it waits, and the host wakes a clone's agent through
//! it.
//!
//! ```text
//!   template:  agent -- preamble, kind Waiting --> builder           then the VM is saved
//!   clone:     agent <-- wake, its control port -- host              then it dials as after a boot
//! ```

use std::io;

use machinen_protocol::preamble::{PREAMBLE_LEN, Preamble, PreambleError, StreamKind, Wake};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// Why an agent did not report that it waits.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    #[error("the guest agent's wake port failed")]
    Port(#[source] io::Error),
    #[error("the guest agent sent something else than that it waits")]
    Unexpected(#[source] PreambleError),
    #[error("the guest agent opened a stream on its wake port")]
    Stream,
}

/// Resolves when the agent waits to be woken. Returns how many of its preparations have failed.
pub(super) async fn waiting(port: &mut UnixStream) -> Result<u64, WakeError> {
    let mut bytes = [0; PREAMBLE_LEN];
    port.read_exact(&mut bytes).await.map_err(WakeError::Port)?;
    match Preamble::decode(&bytes).map_err(WakeError::Unexpected)? {
        Preamble { kind: StreamKind::Waiting, token } => Ok(token),
        _ => Err(WakeError::Stream),
    }
}

/// Wakes the agent, as soon as its VM runs.
pub(super) async fn wake(port: &mut UnixStream, wake: Wake) -> io::Result<()> {
    port.write_all(&wake.encode()).await
}
