//! Connections of containers to UNIX sockets of the host that are in their volumes.
//!
//! ```text
//!   container ──connect(2)──> agent's socket, at the same inode ──raw stream──> host ──connect(2)──> the host's socket
//! ```
//! The host has opened a stream before, so the guest need not ask for one. On the stream the guest sends a
//! [`DialHeader`], and the host answers with an errno (four bytes), which is 0 if there is a connection. Then the bytes of
//! both directions travel in frames as those of [`localhost`](crate::localhost). Numbers are big-endian.

/// The operation of a message like those of linux/fuse.h: which sockets does the host have at this node? The body of the
/// reply is a [`SocketKind`].
pub const KIND_OF_SOCKET: u32 = 0x4d43_0001;

/// Most sockets of the host to which a pod's containers can connect.
pub const MAX_SOCKETS: usize = 256;
/// Most connections of a pod at a time; others wait.
pub const MAX_CONNECTIONS: usize = 256;

/// What a process of the host has bound to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketKind {
    /// Nothing: the process that has bound a socket to the file has closed it.
    Unbound,
    /// A socket that takes connections (SOCK_STREAM or SOCK_SEQPACKET).
    Connections,
    /// A socket that takes datagrams (SOCK_DGRAM).
    Datagrams,
}

impl SocketKind {
    /// The body of the reply.
    pub fn encode(self) -> [u8; 4] {
        let number: u32 = match self {
            Self::Unbound => 0,
            Self::Connections => 1,
            Self::Datagrams => 2,
        };
        number.to_be_bytes()
    }

    /// The kind in the body of a reply, if it is one.
    pub fn decode(body: &[u8]) -> Option<Self> {
        [Self::Unbound, Self::Connections, Self::Datagrams].into_iter().find(|kind| kind.encode() == body)
    }
}

/// A connection that a process of the guest has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialHeader {
    /// The node of the socket in the file system of the volumes.
    pub node: u64,
    /// The effective user of the process.
    pub uid: u32,
    /// The effective group of the process.
    pub gid: u32,
}

impl DialHeader {
    /// Bytes of a header.
    pub const SIZE: usize = 16;

    /// The bytes of the header.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&self.node.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.uid.to_be_bytes());
        bytes[12..].copy_from_slice(&self.gid.to_be_bytes());
        bytes
    }

    /// The header that has these bytes.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Self { node: u64::from(number(0)) << 32 | u64::from(number(4)), uid: number(8), gid: number(12) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_journey() {
        let header = DialHeader { node: 0x0102_0304_0506_0708, uid: 1000, gid: 0xffff_fffe };
        let bytes = header.encode();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 3, 0xe8, 0xff, 0xff, 0xff, 0xfe]);
        assert_eq!(DialHeader::decode(bytes), header);
        for kind in [SocketKind::Unbound, SocketKind::Connections, SocketKind::Datagrams] {
            assert_eq!(SocketKind::decode(&kind.encode()), Some(kind));
        }
        assert_eq!(SocketKind::decode(&[0, 0, 0, 9]), None);
        assert_eq!(SocketKind::decode(&[]), None);
    }
}
