//! Network interfaces as rtnetlink(7) shows and changes them.
//!
//! The host reads the interfaces of a container's namespace, and the guest's agent gives the VM's interface the same
//! addresses and routes. Both speak to their own kernel, so the conversation ([`NetlinkSocket`]) and what an interface
//! has ([`Interface`]) are here once.
//!
//! A socket belongs to the network namespace of the thread that made it, for good. It may be used by any thread.

#![warn(missing_docs)]

mod arrivals;
mod change;
mod counters;
mod interface;
mod listening;
mod message;
pub mod nat;
mod nft;
mod read;
mod rules;
mod socket;

pub use arrivals::mark_arrivals;
pub use counters::{InterfaceCounters, Traffic, counters};
pub use interface::{Interface, InterfaceAddress, Neighbour, Route};
pub use listening::listening_on_localhost;
pub use message::{InvalidInterface, from_message, to_message};
pub use read::interfaces;
pub use rules::{IpVersion, LOCAL_TABLE, RoutingRule};

pub use socket::{NetlinkError, NetlinkSocket, flags};

/// The messages of rtnetlink, for requests that this crate has no function for.
pub mod packet {
    use netlink_packet_core::DefaultNla;
    pub use netlink_packet_route::*;

    /// An attribute that the messages have no name for.
    pub fn other_attribute(kind: u16, value: Vec<u8>) -> DefaultNla {
        DefaultNla::new(kind, value)
    }
}
