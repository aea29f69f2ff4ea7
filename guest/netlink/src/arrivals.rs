//! Marks the packets for some addresses that arrive at an interface and are not for a socket of the namespace, so that a
//! rule of routing can lead them elsewhere.
//!
//! The marks are set after other programs have changed destinations (nft(8), iptables(8)): a packet that one of them has
//! redirected to a socket of the namespace is for that socket.

use std::net::IpAddr;

use crate::{
    NetlinkError,
    nft::{Attributes, Chain, FIRST, Family},
};

const CHAIN: Chain = Chain {
    family: Family::Inet,
    name: "arrivals",
    kind: "filter",
    // NF_INET_PRE_ROUTING, and after NF_IP_PRI_NAT_DST.
    hook: 0,
    priority: -90,
};

/// What the kernel knows about a packet (NFT_META_*).
const MARK: u32 = 3;
const INTERFACE: u32 = 4;
const FAMILY: u32 = 15;
const TRANSPORT: u32 = 16;
/// A protocol of the transport layer (RFC 4443). Its messages of the types 133 to 137 are those of RFC 4861.
const ICMPV6: u8 = 58;

/// The families of addresses (linux/netfilter.h).
const IPV4: u8 = 2;
const IPV6: u8 = 10;

/// Sets the bits `mark` in the marks of packets, in the namespace of this thread, and no other marks that an earlier call
/// has asked for. Without addresses nothing is marked, and nothing is left.
///
/// # Errors
/// The kernel refuses, or cannot look for a packet's socket (nft_socket).
pub fn mark_arrivals(interface: u32, addresses: &[IpAddr], mark: u32) -> Result<(), NetlinkError> {
    let rules: Vec<_> = addresses
        .iter()
        .flat_map(|&address| {
            let discovery = address.is_ipv6().then(|| discovery(interface, address));
            let rest = [for_sockets(interface, address), for_others(interface, address, mark)];
            discovery.into_iter().chain(rest)
        })
        .collect();
    CHAIN.replace(&rules, "mark the packets that arrive for the guest")
}

/// The namespace discovers its neighbours from this address too, and is discovered by them, as with ARP.
fn discovery(interface: u32, address: IpAddr) -> Attributes {
    let mut list = arriving(interface, address);
    list.meta(TRANSPORT);
    list.compare(&[ICMPV6]);
    // The type of the message, which begins the header of the transport layer.
    list.load(2, 0, 1);
    list.compare_between([133], [137]);
    list.accept();
    list
}

/// A packet for a socket stays as it is.
fn for_sockets(interface: u32, address: IpAddr) -> Attributes {
    let mut list = arriving(interface, address);
    // It ends the rule if there is no socket. The key is NFT_SOCKET_TRANSPARENT, which each socket has.
    list.expression("socket", |socket| {
        socket.number(1, 0);
        socket.number(2, FIRST);
    });
    list.accept();
    list
}

fn for_others(interface: u32, address: IpAddr, mark: u32) -> Attributes {
    let mut list = arriving(interface, address);
    list.meta(MARK);
    list.set_bits(mark);
    list.expression("meta", |meta| {
        meta.number(2, MARK);
        meta.number(3, FIRST);
    });
    list
}

fn arriving(interface: u32, address: IpAddr) -> Attributes {
    // The destination in the header of IP.
    let (family, offset, octets) = match address {
        IpAddr::V4(address) => (IPV4, 16, address.octets().to_vec()),
        IpAddr::V6(address) => (IPV6, 24, address.octets().to_vec()),
    };
    let mut list = Attributes::default();
    list.meta(FAMILY);
    list.compare(&[family]);
    list.meta(INTERFACE);
    list.compare(&interface.to_ne_bytes());
    list.load(1, offset, if family == IPV4 { 4 } else { 16 });
    list.compare(&octets);
    list
}
