//! What passes in a network namespace, packet by packet.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use machinen_base::netns;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket},
};

const PATIENCE: Duration = Duration::from_secs(60);

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
/// The type of a neighbour advertisement (RFC 4861).
const ADVERTISEMENT: u8 = 136;

/// A socket that receives all packets of the interfaces of a namespace.
#[derive(Debug)]
pub(super) struct Capture(OwnedFd);

/// A packet of Ethernet, or its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    /// The bytes that the whole packet has.
    pub(super) length: usize,
}

impl Capture {
    pub(super) fn of(namespace: &Path) -> Result<Self> {
        let namespace = netns::open(namespace)?;
        let open = || {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            Ok(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?)
        };
        Ok(Self(netns::inside(namespace.as_fd(), open).context("cannot capture packets")?))
    }

    /// The packets since the last call.
    pub(super) fn frames(&self) -> Result<Vec<Frame>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 256];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) => {
                    frames.push(Frame { bytes: buffer[..length.min(buffer.len())].to_vec(), length });
                }
                Err(Errno::EAGAIN) => return Ok(frames),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("cannot receive packets"),
            }
        }
    }

    /// Waits for a packet, and returns all packets up to that one and some after it.
    pub(super) fn wait_for(&self, what: &str, is_wanted: impl Fn(&Frame) -> bool) -> Result<Vec<Frame>> {
        let deadline = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        loop {
            let frames = self.frames()?;
            let found = frames.iter().any(&is_wanted);
            all.extend(frames);
            if found {
                return Ok(all);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {what} within {PATIENCE:?}, but {} packets", all.len());
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout)?;
        }
    }
}

impl Frame {
    fn at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.get(offset..)?.first_chunk().copied()
    }

    fn kind(&self) -> Option<u16> {
        self.at(12).map(u16::from_be_bytes)
    }

    pub(super) fn sender(&self) -> Option<[u8; 6]> {
        self.at(6)
    }

    fn byte(&self, offset: usize) -> Option<u8> {
        self.bytes.get(offset).copied()
    }

    /// The flags of a packet of TCP from this address of IPv4.
    fn tcp_flags(&self, from: Ipv4Addr) -> Option<u8> {
        let is_tcp = self.kind() == Some(IPV4) && self.byte(23) == Some(TCP);
        let is_from = self.at(26) == Some(from.octets());
        if is_tcp && is_from { self.byte(14 + 20 + 13) } else { None }
    }

    /// The end or the reset of a connection from this address.
    pub(super) fn ends_connection(&self, from: Ipv4Addr) -> bool {
        const FIN: u8 = 1;
        const RST: u8 = 4;
        self.tcp_flags(from).is_some_and(|flags| flags & (FIN | RST) != 0)
    }

    pub(super) fn is_tcp_from(&self, from: Ipv4Addr) -> bool {
        self.tcp_flags(from).is_some()
    }

    /// Whether a container has sent this. The kernel of a namespace sends no more than IPv6's own messages by itself.
    pub(super) fn is_of_a_container(&self, mac: [u8; 6]) -> bool {
        let of_protocol = match self.kind() {
            Some(IPV4 | ARP) => true,
            Some(IPV6) => self.byte(20) != Some(ICMPV6) && self.byte(20) != Some(0),
            _ => false,
        };
        self.sender() == Some(mac) && of_protocol
    }

    /// An ARP packet by which a host announces its address.
    pub(super) fn announces(&self, address: Ipv4Addr, mac: [u8; 6]) -> bool {
        let octets = Some(address.octets());
        self.kind() == Some(ARP) && self.at(22) == Some(mac) && self.at(28) == octets && self.at(38) == octets
    }

    /// The same of IPv6.
    pub(super) fn announces6(&self, address: Ipv6Addr, mac: [u8; 6]) -> bool {
        let is_advertisement = self.kind() == Some(IPV6)
            && self.byte(20) == Some(ICMPV6)
            && self.byte(54) == Some(ADVERTISEMENT);
        is_advertisement && self.sender() == Some(mac) && self.at(62) == Some(address.octets())
    }
}
