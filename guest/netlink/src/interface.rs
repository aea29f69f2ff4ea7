//! What a network interface has, as both sides of the VM describe it.

use std::net::{IpAddr, Ipv4Addr};

/// A network interface of one namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// The kernel's number of the interface.
    pub index: u32,
    /// The name, as eth0.
    pub name: String,
    /// The interface is the loopback one.
    pub loopback: bool,
    /// The interface was switched on.
    pub up: bool,
    /// The hardware address, six bytes with Ethernet.
    pub mac: Vec<u8>,
    /// The largest packet, bytes.
    pub mtu: u32,
    /// The addresses that do not expire.
    pub addresses: Vec<InterfaceAddress>,
    /// The routes of the main table that lead through the interface, in the order in which they can be added: those
    /// without a gateway first.
    pub routes: Vec<Route>,
    /// The neighbours that an administrator has set.
    pub neighbours: Vec<Neighbour>,
    /// How many routes lead through several interfaces, which is not supported.
    pub shared_routes: u32,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The bits that are the network's.
    pub prefix: u8,
    /// The address to which all hosts of the network listen.
    pub broadcast: Option<Ipv4Addr>,
    /// The address of the other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The number of a scope (rtnetlink.h, RT_SCOPE).
    pub scope: u8,
}

/// A route through an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The network that the route leads to. With a prefix of 0: every address of this kind.
    pub destination: IpAddr,
    /// The bits of the destination that count.
    pub prefix: u8,
    /// The next hop; it may be of the other kind of address.
    pub gateway: Option<IpAddr>,
    /// The gateway can be reached although no other route leads to it.
    pub onlink: bool,
    /// The address that packets come from.
    pub source: Option<IpAddr>,
    /// Of two routes with one destination, the lower metric counts.
    pub metric: u32,
    /// The number of a scope (rtnetlink.h, RT_SCOPE).
    pub scope: u8,
    /// The number of the origin of the route (rtnetlink.h, RTPROT).
    pub protocol: u8,
}

/// A neighbour whose hardware address was set by an administrator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The address.
    pub address: IpAddr,
    /// The hardware address.
    pub mac: Vec<u8>,
}
