//! A conversation with the kernel: requests, and their answers.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Flags of requests that change something (netlink(7)).
pub mod flags {
    pub use netlink_packet_core::{
        NLM_F_CREATE as CREATE, NLM_F_EXCL as EXCLUSIVE, NLM_F_REPLACE as REPLACE,
    };
}

/// How often a list is requested again because it has changed while the kernel sent it.
const TRIES: u32 = 20;

/// Why the kernel did not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket cannot be made or used.
    #[error("cannot {action} a netlink socket")]
    Socket {
        /// What failed, as a verb.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The kernel refuses the request.
    #[error("cannot {action}")]
    Refused {
        /// What was requested, as a verb and its object.
        action: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel's answer cannot be read.
    #[error("cannot read the kernel's answer to the request to {action}")]
    Answer {
        /// What was requested, as a verb and its object.
        action: String,
        /// What is wrong with the answer.
        source: DecodeError,
    },
    /// The list changed each time that the kernel sent it.
    #[error("cannot {action}: it changes all the time")]
    Changing {
        /// What was requested, as a verb and its object.
        action: String,
    },
}

impl NetlinkError {
    /// The error number of the kernel, if the kernel has refused the request.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A netlink socket of one network namespace.
#[derive(Debug)]
pub struct NetlinkSocket {
    socket: Socket,
    sequence: u32,
}

impl NetlinkSocket {
    /// Makes a socket in the namespace of this thread.
    ///
    /// # Errors
    /// The errors of socket(2) and bind(2).
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Errors come without the request that they answer.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes a socket in the namespace of this thread that is readable when something of these multicast groups
    /// changes (rtnetlink.h, RTNLGRP).
    ///
    /// # Errors
    /// The errors of socket(2), bind(2) and setsockopt(2).
    pub fn subscribe(groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        groups.iter().try_for_each(|&group| socket.add_membership(group))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Removes all notifications that have arrived.
    ///
    /// # Errors
    /// The errors of recv(2). That notifications were lost is not an error: something has changed.
    pub fn drain(&self) -> io::Result<()> {
        loop {
            match self.socket.recv_from_full() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Changes something. `action` is for errors: a verb and its object.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn change(
        &mut self,
        action: impl Fn() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        loop {
            for answer in self.receive(&action)? {
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                if let NetlinkPayload::Error(error) = answer.payload {
                    return match error.code {
                        None => Ok(()),
                        Some(_) => Err(NetlinkError::Refused { action: action(), source: error.to_io() }),
                    };
                }
            }
        }
    }

    /// Requests a list.
    ///
    /// # Errors
    /// The kernel refuses, or sends what cannot be read.
    pub fn list(
        &mut self,
        action: impl Fn() -> String,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        for _ in 0..TRIES {
            if let Some(list) = self.list_once(&action, message.clone())? {
                return Ok(list);
            }
        }
        Err(NetlinkError::Changing { action: action() })
    }

    /// Returns None if the list has changed meanwhile.
    fn list_once(
        &mut self,
        action: &impl Fn() -> String,
        message: RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, NetlinkError> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut list, mut whole) = (Vec::new(), true);
        loop {
            for answer in self.receive(action)? {
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => list.push(inner),
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(list)),
                    NetlinkPayload::Error(error) => {
                        return Err(NetlinkError::Refused { action: action(), source: error.to_io() });
                    }
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let sent = self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0);
        sent.map(drop).map_err(|source| NetlinkError::Socket { action: "send to", source })
    }

    /// The messages of one datagram.
    fn receive(
        &self,
        action: &impl Fn() -> String,
    ) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
        let received = self.socket.recv_from_full();
        let (bytes, _) =
            received.map_err(|source| NetlinkError::Socket { action: "receive from", source })?;
        let (mut messages, mut rest) = (Vec::new(), &bytes[..]);
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest)
                .map_err(|source| NetlinkError::Answer { action: action(), source })?;
            // Messages begin at multiples of four bytes; a header alone has sixteen.
            let length = (message.header.length as usize).max(16).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }
}

/// Notifications were lost because they were not read in time.
const ENOBUFS: i32 = 105;

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for NetlinkSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
