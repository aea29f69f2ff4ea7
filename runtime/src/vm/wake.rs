//! The wake port: how a template's agent says that it waits, and how a clone's is told to go on.
//!
//! ```text
//!   template:  agent -- preamble, kind Waiting --> builder           then the VM is saved
//!   clone:     agent <-- answer, Accepted -- host                    then it dials as after a boot
//! ```

use std::io;

use machinen_protocol::preamble::{Answer, PREAMBLE_LEN, Preamble, PreambleError, StreamKind};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// Why an agent did not say that it waits.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    #[error("the guest agent's wake port failed")]
    Port(#[source] io::Error),
    #[error("the guest agent does not wait but says something else")]
    Said(#[source] PreambleError),
    #[error("the guest agent opened a stream on its wake port")]
    Stream,
}

/// Resolves when the agent waits to be woken.
pub(super) async fn waiting(port: &mut UnixStream) -> Result<(), WakeError> {
    let mut bytes = [0; PREAMBLE_LEN];
    port.read_exact(&mut bytes).await.map_err(WakeError::Port)?;
    match Preamble::decode(&bytes).map_err(WakeError::Said)? {
        Preamble { kind: StreamKind::Waiting, token: 0 } => Ok(()),
        _ => Err(WakeError::Stream),
    }
}

/// Wakes the agent as soon as its VM runs.
pub(super) async fn wake(port: &mut UnixStream) -> io::Result<()> {
    port.write_all(&Answer::Accepted.encode()).await
}
