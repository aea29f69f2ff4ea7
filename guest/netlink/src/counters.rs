//! Reads what an interface has sent and received.

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};

use crate::{NetlinkError, NetlinkSocket};

/// The counts of one direction of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes in packets that have passed.
    pub bytes: u64,
    /// Packets that have passed.
    pub packets: u64,
    /// Packets that were not whole.
    pub errors: u64,
    /// Packets for which there was no room.
    pub dropped: u64,
}

/// The counts of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InterfaceCounters {
    /// What the interface has received.
    pub received: Traffic,
    /// What the interface has sent.
    pub sent: Traffic,
}

/// The counts of the interface with this name. None: there is no such interface.
///
/// # Errors
/// The kernel refuses, or sends what cannot be read.
pub fn counters(socket: &mut NetlinkSocket, name: &str) -> Result<Option<InterfaceCounters>, NetlinkError> {
    let get = RouteNetlinkMessage::GetLink(LinkMessage::default());
    for message in socket.list(|| "list the network interfaces".to_owned(), get)? {
        let RouteNetlinkMessage::NewLink(link) = message else { continue };
        if link.attributes.iter().any(|found| matches!(found, LinkAttribute::IfName(found) if found == name))
        {
            return Ok(link.attributes.iter().find_map(of));
        }
    }
    Ok(None)
}

fn of(attribute: &LinkAttribute) -> Option<InterfaceCounters> {
    let LinkAttribute::Stats64(stats) = attribute else { return None };
    Some(InterfaceCounters {
        received: Traffic {
            bytes: stats.rx_bytes,
            packets: stats.rx_packets,
            errors: stats.rx_errors,
            dropped: stats.rx_dropped,
        },
        sent: Traffic {
            bytes: stats.tx_bytes,
            packets: stats.tx_packets,
            errors: stats.tx_errors,
            dropped: stats.tx_dropped,
        },
    })
}
