//! Waits to be woken, in a template and its clones.
//!
//! The template is saved while its agent waits here. Every clone resumes here, and its host wakes it.
//! Everything that must differ between clones has to happen afterwards.

use machinen_protocol::{
    WAKE_PORT_NAME,
    preamble::{ANSWER_LEN, Answer, Preamble, StreamKind},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ChannelError, port};

/// Waits until the host wakes this VM. Returns the port, which should be kept open: closing it takes a
/// message to the host.
///
/// # Errors
/// The port does not exist, or the host's answer is not an acceptance.
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
