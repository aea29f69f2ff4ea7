//! Rules of routing (ip-rule(8)): which table of routes decides about a packet.

use std::net::IpAddr;

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage},
};

use crate::{NetlinkError, NetlinkSocket, flags};

/// The table of the namespace's own addresses (linux/rtnetlink.h, RT_TABLE_LOCAL).
pub const LOCAL_TABLE: u32 = 255;

/// Which kind of addresses a rule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// The kind of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn family(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// A rule: packets that have all that it names are led by a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingRule {
    /// For which kind of addresses.
    pub version: IpVersion,
    /// Rules with lower numbers are asked before.
    pub priority: u32,
    /// The packet's destination.
    pub to: Option<IpAddr>,
    /// The interface at which the packet arrives; the loopback interface stands for packets of the namespace's own
    /// sockets.
    pub arriving_at: Option<String>,
    /// Bits that the packet's mark has.
    pub mark: Option<u32>,
    /// The number of the table.
    pub table: u32,
    /// Who has made the rule (linux/rtnetlink.h, RTPROT_*).
    pub owner: u8,
}

impl NetlinkSocket {
    /// Adds a rule, unless it exists.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_rule(&mut self, rule: &RoutingRule) -> Result<(), NetlinkError> {
        let action = || format!("add the rule of routing {}", rule.priority);
        let message = RouteNetlinkMessage::NewRule(rule_message(rule));
        match self.change(action, message, flags::CREATE | flags::EXCLUSIVE) {
            Err(error) if error.errno() == Some(EEXIST) => Ok(()),
            added => added,
        }
    }

    /// Removes a rule. Does nothing if it does not exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_rule(&mut self, rule: &RoutingRule) -> Result<(), NetlinkError> {
        let action = || format!("remove the rule of routing {}", rule.priority);
        match self.change(action, RouteNetlinkMessage::DelRule(rule_message(rule)), 0) {
            Err(error) if error.errno() == Some(ENOENT) => Ok(()),
            removed => removed,
        }
    }

    /// Lists the rules of the socket's namespace that lead to a table.
    ///
    /// # Errors
    /// The kernel refuses, or sends what cannot be read.
    pub fn rules(&mut self, version: IpVersion) -> Result<Vec<RoutingRule>, NetlinkError> {
        let mut message = RuleMessage::default();
        message.header.family = version.family();
        let list =
            self.list(|| "list the rules of routing".to_owned(), RouteNetlinkMessage::GetRule(message))?;
        Ok(list.into_iter().filter_map(|message| rule(version, message)).collect())
    }
}

const ENOENT: i32 = 2;
const EEXIST: i32 = 17;

fn rule_message(rule: &RoutingRule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = rule.version.family();
    message.header.action = RuleAction::ToTable;
    let attributes = &mut message.attributes;
    attributes.extend([
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(rule.owner.into()),
    ]);
    if let Some(to) = rule.to {
        message.header.dst_len = if to.is_ipv4() { 32 } else { 128 };
        attributes.push(RuleAttribute::Destination(to));
    }
    attributes.extend(rule.arriving_at.clone().map(RuleAttribute::Iifname));
    if let Some(mark) = rule.mark {
        attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(mark)]);
    }
    message
}

/// None: the message is not that of a rule that leads to a table.
fn rule(version: IpVersion, message: RouteNetlinkMessage) -> Option<RoutingRule> {
    let RouteNetlinkMessage::NewRule(message) = message else { return None };
    if message.header.action != RuleAction::ToTable {
        return None;
    }
    let table = message.header.table.into();
    let mut rule =
        RoutingRule { version, priority: 0, to: None, arriving_at: None, mark: None, table, owner: 0 };
    for attribute in message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = priority,
            RuleAttribute::Table(table) => rule.table = table,
            RuleAttribute::Destination(to) => rule.to = Some(to),
            RuleAttribute::Iifname(name) => rule.arriving_at = Some(name),
            RuleAttribute::FwMark(mark) => rule.mark = Some(mark),
            RuleAttribute::Protocol(protocol) => rule.owner = RouteProtocol::into(protocol),
            _ => {}
        }
    }
    Some(rule)
}
