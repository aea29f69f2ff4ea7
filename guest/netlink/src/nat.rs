//! Leads what this namespace's processes send to a local address and port to another port of the same address, as
//! nft(8) does by a rule `ip daddr ADDRESS udp dport 53 dnat to ADDRESS:PORT` in an output chain of the type nat.
//!
//! The messages are those of linux/netfilter/nf_tables.h. All of them travel in one batch, which the kernel applies as
//! a whole or not at all (linux/netfilter/nfnetlink.h).

use std::{io, net::Ipv4Addr};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::NetlinkError;

/// The table that has the rules, and nothing else.
const TABLE: &str = "machinen";
const CHAIN: &str = "nameservers";

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
    let mut batch = Batch::default();
    batch.message(message::BATCH_BEGIN, 0, |_| ());
    // A table that does not exist cannot be removed.
    batch.message(message::NEW_TABLE, CREATE, |table| table.text(attribute::TABLE_NAME, TABLE));
    batch.message(message::DELETE_TABLE, 0, |table| table.text(attribute::TABLE_NAME, TABLE));
    if !redirections.is_empty() {
        batch.message(message::NEW_TABLE, CREATE, |table| table.text(attribute::TABLE_NAME, TABLE));
        batch.message(message::NEW_CHAIN, CREATE, chain);
        for redirection in redirections {
            batch.message(message::NEW_RULE, CREATE | APPEND, |rule| rule_of(rule, redirection));
        }
    }
    batch.message(message::BATCH_END, 0, |_| ());
    batch.run()
}

/// Numbers of nf_tables.h and nfnetlink.h; each message has the number of its subsystem, nf_tables, in the upper byte.
mod message {
    pub(super) const BATCH_BEGIN: u16 = 0x10;
    pub(super) const BATCH_END: u16 = 0x11;
    pub(super) const NEW_TABLE: u16 = NF_TABLES << 8;
    pub(super) const DELETE_TABLE: u16 = NF_TABLES << 8 | 2;
    pub(super) const NEW_CHAIN: u16 = NF_TABLES << 8 | 3;
    pub(super) const NEW_RULE: u16 = NF_TABLES << 8 | 6;
    pub(super) const NF_TABLES: u16 = 10;
}

/// Numbers of attributes (nf_tables.h). The attributes of an expression are numbered for each kind of expression.
mod attribute {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const EXPRESSION_NAME: u16 = 1;
    pub(super) const EXPRESSION_DATA: u16 = 2;
    pub(super) const DATA_VALUE: u16 = 1;
}

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// An answer of the kernel: an error number, which may be 0 (netlink(7), NLMSG_ERROR).
const ANSWER: u16 = 2;
const HEADER: usize = 16;

const IPV4: u8 = 2;
/// NF_INET_LOCAL_OUT and NF_IP_PRI_NAT_DST.
const LOCAL_OUTPUT: u32 = 3;
const DESTINATION_NAT: i32 = -100;
/// Registers of nf_tables.
const FIRST: u32 = 1;
const SECOND: u32 = 2;

fn chain(chain: &mut Attributes) {
    chain.text(attribute::CHAIN_TABLE, TABLE);
    chain.text(attribute::CHAIN_NAME, CHAIN);
    chain.text(attribute::CHAIN_TYPE, "nat");
    chain.nested(attribute::CHAIN_HOOK, |hook| {
        hook.number(attribute::HOOK_NUMBER, LOCAL_OUTPUT);
        hook.number(attribute::HOOK_PRIORITY, DESTINATION_NAT.cast_unsigned());
    });
}

fn rule_of(rule: &mut Attributes, redirection: &Redirection) {
    let &Redirection { address, transport, from, to } = redirection;
    rule.text(attribute::RULE_TABLE, TABLE);
    rule.text(attribute::RULE_CHAIN, CHAIN);
    rule.nested(attribute::RULE_EXPRESSIONS, |list| {
        // The protocol of the transport layer (NFT_META_L4PROTO).
        list.expression("meta", |meta| {
            meta.number(1, FIRST);
            meta.number(2, 16);
        });
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
            nat.number(2, u32::from(IPV4));
            nat.number(3, FIRST);
            nat.number(5, SECOND);
        });
    });
}

/// The attributes of a message, or of another attribute. Numbers are big-endian.
#[derive(Debug, Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn add(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).expect("all values here are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn text(&mut self, kind: u16, text: &str) {
        self.add(kind, &[text.as_bytes(), &[0]].concat());
    }

    fn number(&mut self, kind: u16, number: u32) {
        self.add(kind, &number.to_be_bytes());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        const NESTED: u16 = 0x8000;
        let mut inner = Self::default();
        fill(&mut inner);
        self.add(kind | NESTED, &inner.0);
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.nested(attribute::LIST_ELEMENT, |element| {
            element.text(attribute::EXPRESSION_NAME, name);
            element.nested(attribute::EXPRESSION_DATA, fill);
        });
    }

    /// Loads bytes of a packet's header into the first register.
    fn load(&mut self, header: u32, offset: u32, length: u32) {
        self.expression("payload", |payload| {
            for (kind, number) in (1..).zip([FIRST, header, offset, length]) {
                payload.number(kind, number);
            }
        });
    }

    /// Ends the rule unless the first register has this value.
    fn compare(&mut self, value: &[u8]) {
        self.expression("cmp", |compare| {
            compare.number(1, FIRST);
            // NFT_CMP_EQ.
            compare.number(2, 0);
            compare.nested(3, |data| data.add(attribute::DATA_VALUE, value));
        });
    }

    fn constant(&mut self, register: u32, value: &[u8]) {
        self.expression("immediate", |immediate| {
            immediate.number(1, register);
            immediate.nested(2, |data| data.add(attribute::DATA_VALUE, value));
        });
    }
}

/// Messages that the kernel takes together.
#[derive(Debug, Default)]
struct Batch {
    bytes: Vec<u8>,
    messages: u32,
    /// The number of the last message that the kernel answers.
    answered: u32,
}

impl Batch {
    fn message(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        let mut attributes = Attributes::default();
        fill(&mut attributes);
        self.messages += 1;
        // The ends of a batch name the subsystem, and are not answered.
        let is_end = [message::BATCH_BEGIN, message::BATCH_END].contains(&kind);
        let (family, resource, acknowledge) =
            if is_end { (0, message::NF_TABLES, 0) } else { (IPV4, 0, ACKNOWLEDGE) };
        if !is_end {
            self.answered = self.messages;
        }
        let length = u32::try_from(HEADER + 4 + attributes.0.len()).expect("all messages here are short");
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | acknowledge | flags).to_ne_bytes());
        self.bytes.extend(self.messages.to_ne_bytes());
        self.bytes.extend(0_u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attributes.0);
    }

    fn run(self) -> Result<(), NetlinkError> {
        let broken = |action| move |source| NetlinkError::Socket { action, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(broken("make"))?;
        socket.bind_auto().map_err(broken("make"))?;
        socket.set_cap_ack(true).map_err(broken("make"))?;
        socket.send_to(&self.bytes, &SocketAddr::new(0, 0), 0).map_err(broken("send to"))?;
        loop {
            let (bytes, _) = socket.recv_from_full().map_err(broken("receive from"))?;
            let mut rest = &bytes[..];
            while let Some(answer) = rest.first_chunk::<{ HEADER + 4 }>() {
                if self.check(answer)? == Some(true) {
                    return Ok(());
                }
                let length = u32::from_ne_bytes([answer[0], answer[1], answer[2], answer[3]]) as usize;
                rest = rest.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Returns whether an answer is that to the last message; None: the message is no answer.
    fn check(&self, answer: &[u8; HEADER + 4]) -> Result<Option<bool>, NetlinkError> {
        let number =
            |at: usize| u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
        if u16::from_ne_bytes([answer[4], answer[5]]) != ANSWER {
            return Ok(None);
        }
        match number(HEADER).cast_signed() {
            0 => Ok(Some(number(8) == self.answered)),
            error => Err(NetlinkError::Refused {
                action: "redirect what is sent to nameservers".to_owned(),
                source: io::Error::from_raw_os_error(-error),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_count_no_padding() {
        let mut attributes = Attributes::default();
        attributes.text(1, "ab");
        attributes.nested(2, |inner| inner.number(3, 0x0102_0304));
        let native = |number: u16| number.to_ne_bytes();
        let wanted = [
            &native(7)[..],
            &native(1),
            b"ab\0\0",
            &native(12),
            &native(0x8002),
            &native(8),
            &native(3),
            &[1, 2, 3, 4],
        ]
        .concat();
        assert_eq!(attributes.0, wanted);
    }
}
