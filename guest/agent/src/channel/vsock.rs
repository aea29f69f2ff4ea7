//! Streams over AF_VSOCK (vsock(7)).

use std::{io, time::Duration};

use machinen_protocol::{STREAM_PORT, control_port};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::{ChannelError, Stream, Unclaimed, preamble};
use crate::console;

/// A host that listens answers within a millisecond.
const DIAL_TIMEOUT: Duration = Duration::from_millis(250);
const DIALS: usize = 20;

/// Longest write to the host. The kernel spreads a larger packet over several descriptors. vhost-device-vsock
/// 0.3 silently drops such packets: the bytes and the credit for them are lost, and the stream stalls.
pub(super) const MAX_WRITE: usize = 28 << 10;

/// A listener for any CID, so that it survives a change of the VM's CID.
#[derive(Debug)]
pub(crate) struct Listener(VsockListener);

impl Listener {
    pub(super) fn bind() -> Result<Self, ChannelError> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
            .map(Self)
            .map_err(|source| ChannelError::Listen { port: STREAM_PORT, source })
    }

    /// Accepts in the background, for as long as the agent lives.
    pub(super) fn accept_into(self, unclaimed: Unclaimed) {
        tokio::spawn(async move {
            loop {
                match self.0.accept().await {
                    // Containers share the VM's sockets: only the host may open streams.
                    Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                        tokio::spawn(preamble::welcome(Stream::Vsock(stream), unclaimed.clone()));
                    }
                    Ok((_, peer)) => console::say(&format!("refused a stream of CID {}", peer.cid())),
                    Err(err) => console::say(&format!("cannot accept a stream: {err}")),
                }
            }
        });
    }
}

/// Dials the host's control port. A clone learns its own address only when its kernel has processed the reset
/// of the device (virtio 1.2, 5.10.6.7). What it sends before that is dropped, so a call without an answer is
/// repeated.
pub(super) async fn dial() -> Result<Stream, ChannelError> {
    let mut port = 0;
    for _ in 0..DIALS {
        port = control_port(vsock::get_local_cid().map_err(ChannelError::Cid)?);
        let call = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port));
        if let Ok(answered) = timeout(DIAL_TIMEOUT, call).await {
            return answered.map(Stream::Vsock).map_err(|source| ChannelError::Dial { port, source });
        }
    }
    Err(ChannelError::Dial { port, source: io::ErrorKind::TimedOut.into() })
}
