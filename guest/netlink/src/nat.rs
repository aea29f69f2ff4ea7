//! Leads what this namespace's processes send to a local address and port to another port of the same address, as
//! nft(8) does by a rule `ip daddr ADDRESS udp dport 53 dnat to ADDRESS:PORT` in an output chain of the type nat.

use std::net::Ipv4Addr;

use crate::{
    NetlinkError,
    nft::{Attributes, Chain, FIRST, Family, SECOND},
};

const CHAIN: Chain = Chain {
    family: Family::Ipv4,
    name: "nameservers",
    kind: "nat",
    // NF_INET_LOCAL_OUT and NF_IP_PRI_NAT_DST.
    hook: 3,
    priority: -100,
};

/// The protocols of the transport layer that a redirection is for (RFC 1700).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

/// What is sent to one port of an address reaches another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirection {
    /// An address of the loopback interface.
    pub address: Ipv4Addr,
    /// For which protocol.
    pub transport: Transport,
    /// The port that a process sends to.
    pub from: u16,
    /// The port at which a process listens.
    pub to: u16,
}

/// Redirects as listed, in the namespace of this thread, and no more as an earlier call has asked for.
///
/// # Errors
/// The kernel refuses, or has no nf_tables.
pub fn redirect(redirections: &[Redirection]) -> Result<(), NetlinkError> {
    let rules: Vec<_> = redirections.iter().map(rule_of).collect();
    CHAIN.replace(&rules, "redirect what is sent to nameservers")
}

fn rule_of(redirection: &Redirection) -> Attributes {
    let &Redirection { address, transport, from, to } = redirection;
    let mut list = Attributes::default();
    // The protocol of the transport layer (NFT_META_L4PROTO).
    list.meta(16);
    list.compare(&[transport as u8]);
    // The destination in the header of IPv4, and the port in that of the transport layer.
    list.load(1, 16, 4);
    list.compare(&address.octets());
    list.load(2, 2, 2);
    list.compare(&from.to_be_bytes());
    list.constant(FIRST, &address.octets());
    list.constant(SECOND, &to.to_be_bytes());
    list.expression("nat", |nat| {
        // NFT_NAT_DNAT.
        nat.number(1, 1);
        nat.number(2, Family::Ipv4 as u32);
        nat.number(3, FIRST);
        nat.number(5, SECOND);
    });
    list
}
