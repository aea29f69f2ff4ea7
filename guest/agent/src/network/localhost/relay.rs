//! One connection between a raw stream, on which it travels in frames, and a socket of the guest.

use std::{io, time::Duration};

use machinen_protocol::localhost::MAX_FRAME;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    net::TcpStream,
    time::timeout,
};

use crate::channel::Stream;

/// How long the host may take to acknowledge the end of a connection.
pub(crate) const ENDED_WITHIN: Duration = Duration::from_secs(10);

/// Relays until both directions have ended. If one of them fails, the socket is reset.
pub(super) async fn relay(mut socket: TcpStream, stream: Stream) {
    let (mut reader, mut writer) = split(stream);
    let (from, to) = socket.split();
    let relayed = tokio::try_join!(send_frames(from, &mut writer), take_frames(&mut reader, to));
    match relayed {
        // The host has everything when it sends one more frame without bytes, and only then the stream may be closed.
        Ok(_) => drop(timeout(ENDED_WITHIN, reader.read_u16()).await),
        // The connection ends with the first error, whichever side has caused it.
        Err(_) => drop(socket.set_zero_linger()),
    }
}

/// Sends what arrives in frames, until it ends.
pub(crate) async fn send_frames(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut frame = vec![0; 2 + MAX_FRAME];
    loop {
        let read = from.read(&mut frame[2..]).await?;
        frame[..2].copy_from_slice(&u16::try_from(read).map_err(io::Error::other)?.to_be_bytes());
        to.write_all(&frame[..2 + read]).await?;
        to.flush().await?;
        if read == 0 {
            return Ok(());
        }
    }
}

/// Writes the content of frames, until an empty one arrives.
pub(crate) async fn take_frames(
    from: &mut (impl AsyncRead + Unpin),
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let length = usize::from(from.read_u16().await?);
        if length == 0 {
            return to.shutdown().await;
        }
        let frame = frame.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        from.read_exact(frame).await?;
        to.write_all(frame).await?;
    }
}
