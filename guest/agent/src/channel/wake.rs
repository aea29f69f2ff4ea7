//! Waiting to be woken: how a VM that is saved and cloned knows which of the two it is.
//!
//! The VM is saved while the agent waits here. Every clone of it goes on from here, when its host says so; whatever
//! must not be the same in all of them has to come after.

use machinen_protocol::{
    WAKE_PORT_NAME,
    preamble::{ANSWER_LEN, Answer, Preamble, StreamKind},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ChannelError, port};

/// Returns the port, which is better kept: closing it takes a message to the host.
///
/// # Errors
/// There is no such port, or the host says something else than to go on.
pub(crate) async fn wait() -> Result<port::Port, ChannelError> {
    let mut port = port::open(WAKE_PORT_NAME).await?;
    port.write_all(&Preamble { kind: StreamKind::Waiting, token: 0 }.encode())
        .await
        .map_err(ChannelError::Wake)?;
    let mut answer = [0; ANSWER_LEN];
    port.read_exact(&mut answer).await.map_err(ChannelError::Wake)?;
    match Answer::decode(&answer).map_err(ChannelError::Preamble)? {
        Answer::Accepted => Ok(port),
        Answer::WrongVersion | Answer::Refused => Err(ChannelError::Refused),
    }
}
