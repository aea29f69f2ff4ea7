//! AF_VSOCK (vsock(7)).

use machinen_protocol::{STREAM_PORT, control_port};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::{ChannelError, Stream, Unclaimed, preamble};
use crate::console;

/// Binds at once and accepts in the background, for as long as the agent lives. The socket is bound to any CID,
/// so it outlives a change of the VM's.
pub(super) fn listen(unclaimed: Unclaimed) -> Result<(), ChannelError> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
        .map_err(|source| ChannelError::Listen { port: STREAM_PORT, source })?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                // A container shares the VM's sockets: only the host may bring streams.
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                    tokio::spawn(preamble::welcome(Stream::Vsock(stream), unclaimed.clone()));
                }
                Ok((_, peer)) => console::say(&format!("refused a stream of CID {}", peer.cid())),
                Err(err) => console::say(&format!("cannot accept a stream: {err}")),
            }
        }
    });
    Ok(())
}

pub(super) async fn dial() -> Result<Stream, ChannelError> {
    let cid = vsock::get_local_cid().map_err(ChannelError::Cid)?;
    let port = control_port(cid);
    VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, port))
        .await
        .map(Stream::Vsock)
        .map_err(|source| ChannelError::Dial { port, source })
}
