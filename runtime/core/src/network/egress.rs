//! Whether packets of a guest leave, for containers whose connections outlive them.
//!
//! ```text
//!   Closed ── open ──> Open ── hold ──> Held ── open ──> Open
//!   (created)          (started)          └── the VM ends ──> resets of the namespace's own kernel are dropped
//! ```
//! - The connections of a restored container work as soon as CRIU has made them, which is before its start. Nothing is
//!   sent until then.
//! - A container that ends with its checkpoint leaves its connections to the container that is restored from it. The
//!   end must not reach the other side, nor an acknowledgement of data that the checkpoint does not have. When the VM has
//!   ended, the namespace's own kernel, which has the addresses but not the connections, must not answer either.
//!
//! What arrives is redirected to the guest all the time: an answer of the namespace's own kernel would be a reset.

use std::net::IpAddr;

use machinen_base::error::chain;
use machinen_netlink::NetlinkSocket;

use super::wiring::drop_resets;

/// Whether packets of the guest leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Egress {
    /// No container has been started.
    #[default]
    Closed,
    Open,
    /// A checkpoint has the connections.
    Held,
}

impl Egress {
    /// The addresses from which the guest may send, of those that it has.
    pub(super) fn of(self, addresses: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
        if self == Self::Open { addresses.collect() } else { Vec::new() }
    }

    /// Has the connections that a checkpoint has outlast the end of the redirection. A failure is logged, because the
    /// redirection must be removed in any case.
    pub(super) fn keep_connections(self, socket: &mut NetlinkSocket, interface: u32) {
        if self != Self::Held {
            return;
        }
        if let Err(error) = drop_resets(socket, interface) {
            tracing::warn!(
                "the connections of a checkpoint may be reset by the host's kernel before they are restored: {}",
                chain(&error)
            );
        }
    }
}
