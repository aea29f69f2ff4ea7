//! Exchanges the first bytes of a stream, as the dialling and as the accepting side.

use machinen_protocol::preamble::{ANSWER_LEN, Answer, PREAMBLE_LEN, Preamble, PreambleError, StreamKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{ChannelError, Stream, Unclaimed};
use crate::console;

/// Sends the first bytes of the control stream, and reads the answer.
pub(super) async fn greet(stream: &mut Stream) -> Result<(), ChannelError> {
    stream
        .write_all(&Preamble { kind: StreamKind::Control, token: 0 }.encode())
        .await
        .map_err(ChannelError::Greet)?;
    stream.flush().await.map_err(ChannelError::Greet)?;
    let mut answer = [0; ANSWER_LEN];
    stream.read_exact(&mut answer).await.map_err(ChannelError::Greet)?;
    match Answer::decode(&answer).map_err(ChannelError::Preamble)? {
        Answer::Accepted => Ok(()),
        Answer::WrongVersion | Answer::Refused => Err(ChannelError::Refused),
    }
}

/// Reads the first bytes of a stream that the host has dialled, answers them, and files the stream.
pub(super) async fn welcome(mut stream: Stream, unclaimed: Unclaimed) {
    let mut bytes = [0; PREAMBLE_LEN];
    if stream.read_exact(&mut bytes).await.is_err() {
        // The host has closed the stream already.
        return;
    }
    let refusal = match Preamble::decode(&bytes) {
        Ok(Preamble { kind: StreamKind::Raw, token }) if token != 0 => match unclaimed.reserve(token) {
            Some(slot) => {
                let answered = stream.write_all(&Answer::Accepted.encode()).await;
                if answered.is_ok() && stream.flush().await.is_ok() {
                    slot.fill(stream);
                }
                return;
            }
            None => Answer::Refused,
        },
        Ok(_) | Err(PreambleError::Unknown { .. } | PreambleError::NotMachinen) => Answer::Refused,
        Err(PreambleError::Version { .. }) => Answer::WrongVersion,
    };
    console::say(&format!("refused a stream of the host: {refusal:?}"));
    // The stream is closed now, even if the answer does not arrive.
    if stream.write_all(&refusal.encode()).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}
