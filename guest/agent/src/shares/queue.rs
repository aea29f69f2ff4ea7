//! Passes the kernel's requests to the host on one stream, one at a time, and the replies back.

use std::{io, os::fd::OwnedFd, sync::Arc};

use machinen_protocol::{
    fuse::{REPLY_HEADER, REQUEST_HEADER, ReplyHeader, RequestHeader, opcode},
    shares::MAX_MESSAGE,
};
use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd};

use crate::channel::Stream;

/// Runs until the file system is unmounted, or the stream ends.
///
/// # Errors
/// The stream has failed, or the host sent what is not a reply to the request.
pub(super) async fn run(device: Arc<AsyncFd<OwnedFd>>, mut stream: Stream) -> io::Result<()> {
    let mut message = vec![0; MAX_MESSAGE];
    while let Some(request) = read(&device, &mut message).await? {
        // A request that is being answered cannot be given up. With the last file of a file system that is unmounted
        // nothing is left to be done on the host.
        if matches!(request.opcode, opcode::INTERRUPT | opcode::DESTROY) {
            continue;
        }
        stream.write_all(&message[..request.length]).await?;
        stream.flush().await?;
        if request.is_answered() {
            let length = receive(&mut stream, request, &mut message).await?;
            write(&device, &message[..length])?;
        }
    }
    Ok(())
}

/// The next request, in `message`. None: the file system was unmounted.
async fn read(device: &AsyncFd<OwnedFd>, message: &mut [u8]) -> io::Result<Option<RequestHeader>> {
    loop {
        let mut ready = device.readable().await?;
        let length = match ready.try_io(|device| Ok(nix::unistd::read(device, message)?)) {
            Err(_) => continue,
            Ok(Ok(length)) => length,
            Ok(Err(error)) => match error.raw_os_error() {
                // The calling process has given up.
                Some(libc::ENOENT | libc::EINTR) => continue,
                Some(libc::ENODEV | libc::ECONNABORTED) => return Ok(None),
                _ => return Err(error),
            },
        };
        let header = message[..length].first_chunk::<REQUEST_HEADER>();
        let header = header.ok_or(io::ErrorKind::InvalidData)?;
        return RequestHeader::decode_within(header, MAX_MESSAGE).map(Some).map_err(io::Error::other);
    }
}

async fn receive(stream: &mut Stream, request: RequestHeader, message: &mut [u8]) -> io::Result<usize> {
    let (header, body) = message.split_at_mut(REPLY_HEADER);
    stream.read_exact(header).await?;
    let header = header.as_array().expect("split there");
    let reply = ReplyHeader::decode_within(header, MAX_MESSAGE).map_err(io::Error::other)?;
    if reply.unique != request.unique {
        return Err(io::Error::other("the host's reply is to another request"));
    }
    stream.read_exact(&mut body[..reply.length - REPLY_HEADER]).await?;
    Ok(reply.length)
}

fn write(device: &AsyncFd<OwnedFd>, reply: &[u8]) -> io::Result<()> {
    match nix::unistd::write(device.get_ref(), reply) {
        // Nothing waits for the reply any more.
        Ok(_) | Err(Errno::ENOENT | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
