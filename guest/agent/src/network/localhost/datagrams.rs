//! The datagrams of one sender between a raw stream, on which each is a frame, and a socket of the guest.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use machinen_protocol::localhost::MAX_DATAGRAM;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split},
    net::UdpSocket,
};

use crate::channel::Stream;

/// A socket that sends to this address, and receives from it only.
pub(super) async fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let own: IpAddr = address.ip();
    let socket = UdpSocket::bind((own, 0)).await?;
    socket.connect(address).await?;
    Ok(socket)
}

/// Relays until the host closes the stream, or nothing receives the datagrams.
pub(super) async fn relay(socket: UdpSocket, stream: Stream) {
    let (mut reader, mut writer) = split(stream);
    // The stream ends with the first error, whichever side has caused it.
    tokio::select! {
        ended = send_frames(&socket, &mut writer) => drop(ended),
        ended = take_frames(&mut reader, &socket) => drop(ended),
    }
}

async fn send_frames(socket: &UdpSocket, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut frame = vec![0; 2 + MAX_DATAGRAM];
    loop {
        let received = socket.recv(&mut frame[2..]).await?;
        if received > 0 {
            frame[..2].copy_from_slice(&u16::try_from(received).map_err(io::Error::other)?.to_be_bytes());
            to.write_all(&frame[..2 + received]).await?;
            to.flush().await?;
        }
    }
}

async fn take_frames(from: &mut (impl AsyncRead + Unpin), socket: &UdpSocket) -> io::Result<()> {
    let mut frame = vec![0; MAX_DATAGRAM];
    loop {
        let length = usize::from(from.read_u16().await?);
        let frame = frame.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        from.read_exact(frame).await?;
        socket.send(frame).await?;
    }
}
