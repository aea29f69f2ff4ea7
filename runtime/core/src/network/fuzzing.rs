//! What a guest sends about localhost and nameservers; for fuzzing.

use std::{fs::File, io, net::Ipv4Addr, sync::Arc};

use machinen_vm::BoxedStream;

use super::{localhost, nameservers};

/// Reads a report of ports. Returns their number.
///
/// # Errors
/// The report is not valid.
pub async fn report(mut stream: BoxedStream) -> io::Result<usize> {
    localhost::read_report(&mut stream).await.map(|ports| ports.len())
}

/// Takes the frames of a connection until its end. Returns what a process of the host would read.
///
/// # Errors
/// A frame is not valid, or the stream has ended before the connection.
pub async fn frames(mut stream: BoxedStream) -> io::Result<Vec<u8>> {
    let mut taken = Vec::new();
    localhost::take_frames(&mut stream, &mut taken).await.map(|()| taken)
}

/// Answers queries to a nameserver that does not exist, until the stream ends.
///
/// # Errors
/// This process's network namespace cannot be opened.
pub async fn queries(stream: BoxedStream) -> io::Result<()> {
    let namespace = File::open("/proc/self/ns/net")?;
    nameservers::answer(stream, Arc::new(namespace.into()), vec![Ipv4Addr::new(127, 200, 0, 1)]).await;
    Ok(())
}
