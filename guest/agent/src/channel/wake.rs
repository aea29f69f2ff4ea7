//! Waits to be woken, in a template and its clones.
//!
//! The template is saved while its agent waits here. Every clone resumes here, and its host wakes it.
//! Everything that must differ between clones has to happen afterwards.

use machinen_protocol::{
    WAKE_PORT_NAME,
    preamble::{Preamble, StreamKind, WAKE_LEN, Wake},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ChannelError, port};

/// Reports that this VM waits, and how many of its preparations have `failed`, until the host wakes it. Returns the host's message, and the port, which should be kept open: closing
/// it takes a message to the host.
///
/// # Errors
/// The port does not exist, or the host's message is not valid.
pub(crate) async fn wait(failed: u64) -> Result<(Wake, port::Port), ChannelError> {
    let mut port = port::open(WAKE_PORT_NAME).await?;
    port.write_all(&Preamble { kind: StreamKind::Waiting, token: failed }.encode())
        .await
        .map_err(ChannelError::Wake)?;
    let mut message = [0; WAKE_LEN];
    port.read_exact(&mut message).await.map_err(ChannelError::Wake)?;
    Ok((Wake::decode(&message).map_err(ChannelError::Preamble)?, port))
}
