//! DNS messages on their way to a nameserver that only the pod's network namespace on the host has.
//!
//! ```text
//!   container ──UDP, TCP──> agent ──raw stream──> host ──UDP, TCP──> nameserver at 127.x.y.z, port 53
//! ```
//! Docker's nameserver, for one, is at 127.0.0.11 in each container's network namespace. The stream carries queries one
//! way and replies the other way, each of them a header and then the message (RFC 1035, section 4). A query is answered
//! by one reply, in any order; an empty one means that the nameserver did not answer.

use std::time::Duration;

/// The port of nameservers.
pub const PORT: u16 = 53;
/// Most nameservers of a pod.
pub const MAX_NAMESERVERS: usize = 8;
/// Most queries that wait for their replies.
pub const MAX_OPEN: usize = 32;
/// How long the host waits for a nameserver.
pub const ANSWERED_WITHIN: Duration = Duration::from_secs(8);

/// How a message reached the agent, and is to reach the nameserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One datagram.
    Udp,
    /// A message on a connection.
    Tcp,
}

/// What precedes a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryHeader {
    /// Of the agent's choice; the reply has the same.
    pub id: u32,
    /// The place of the nameserver in the request that has set up the stream.
    pub nameserver: u8,
    /// How the message reached the agent.
    pub transport: Transport,
    /// Bytes of the message.
    pub length: u16,
}

/// What precedes a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHeader {
    /// That of the query.
    pub id: u32,
    /// Bytes of the message; 0: the nameserver did not answer.
    pub length: u16,
}

/// The header names a transport that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a query has the unknown transport {0}")]
pub struct UnknownTransport(u8);

impl QueryHeader {
    /// Bytes of the header.
    pub const SIZE: usize = 8;

    /// The header as it travels: the id and the length are big-endian.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let ([a, b, c, d], [high, low]) = (self.id.to_be_bytes(), self.length.to_be_bytes());
        [a, b, c, d, self.nameserver, self.transport as u8, high, low]
    }

    /// Reads a header.
    ///
    /// # Errors
    /// The transport is unknown.
    pub fn decode(
        [a, b, c, d, nameserver, transport, high, low]: [u8; Self::SIZE],
    ) -> Result<Self, UnknownTransport> {
        let transport = match transport {
            0 => Transport::Udp,
            1 => Transport::Tcp,
            other => return Err(UnknownTransport(other)),
        };
        let (id, length) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([high, low]));
        Ok(Self { id, nameserver, transport, length })
    }
}

impl ReplyHeader {
    /// Bytes of the header.
    pub const SIZE: usize = 6;

    /// The header as it travels: both numbers are big-endian.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let ([a, b, c, d], [high, low]) = (self.id.to_be_bytes(), self.length.to_be_bytes());
        [a, b, c, d, high, low]
    }

    /// Reads a header.
    pub fn decode([a, b, c, d, high, low]: [u8; Self::SIZE]) -> Self {
        Self { id: u32::from_be_bytes([a, b, c, d]), length: u16::from_be_bytes([high, low]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_journey() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let query = QueryHeader { id: 0x0102_0304, nameserver: 7, transport, length: 0x0506 };
            assert_eq!(QueryHeader::decode(query.encode()), Ok(query));
        }
        let reply = ReplyHeader { id: 0x0102_0304, length: 0x0506 };
        assert_eq!(reply.encode(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(ReplyHeader::decode(reply.encode()), reply);
        assert_eq!(QueryHeader::decode([0, 0, 0, 0, 0, 2, 0, 0]), Err(UnknownTransport(2)));
    }
}
