//! The language of nf_tables (nft(8)): messages that make tables, chains and rules of the firewall.
//!
//! The messages are those of linux/netfilter/nf_tables.h. All of them travel in one batch, which the kernel applies as
//! a whole or not at all (linux/netfilter/nfnetlink.h).

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::NetlinkError;

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
    pub(super) const DATA_VERDICT: u16 = 2;
}

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// An answer of the kernel: an error number, which may be 0 (netlink(7), NLMSG_ERROR).
const ANSWER: u16 = 2;
const HEADER: usize = 16;

/// The table that has the rules, and nothing else.
const TABLE: &str = "machinen";

/// The families of tables (linux/netfilter.h, NFPROTO_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4 and IPv6.
    Inet = 1,
    /// IPv4.
    Ipv4 = 2,
}

/// A chain that the kernel calls for packets. It is alone in a table of its family, which no other program uses.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) family: Family,
    pub(crate) name: &'static str,
    /// What its rules may do: nat or filter.
    pub(crate) kind: &'static str,
    /// Where the kernel calls it (linux/netfilter.h, NF_INET_*).
    pub(crate) hook: u32,
    /// Chains with lower numbers are called before.
    pub(crate) priority: i32,
}

impl Chain {
    /// Replaces the chain in the namespace of this thread by one with these rules, each of them the list of its
    /// expressions. Without rules there is no chain. `action` is for errors: a verb and its object.
    ///
    /// # Errors
    /// The kernel refuses, or has no nf_tables.
    pub(crate) fn replace(&self, rules: &[Attributes], action: &str) -> Result<(), NetlinkError> {
        let mut batch = Batch::new(self.family);
        batch.message(message::BATCH_BEGIN, 0, |_| ());
        // A table that does not exist cannot be removed.
        batch.message(message::NEW_TABLE, CREATE, |table| table.text(attribute::TABLE_NAME, TABLE));
        batch.message(message::DELETE_TABLE, 0, |table| table.text(attribute::TABLE_NAME, TABLE));
        if !rules.is_empty() {
            batch.message(message::NEW_TABLE, CREATE, |table| table.text(attribute::TABLE_NAME, TABLE));
            batch.message(message::NEW_CHAIN, CREATE, |chain| self.describe(chain));
            for expressions in rules {
                batch.message(message::NEW_RULE, CREATE | APPEND, |rule| {
                    rule.text(attribute::RULE_TABLE, TABLE);
                    rule.text(attribute::RULE_CHAIN, self.name);
                    rule.nested(attribute::RULE_EXPRESSIONS, |list| list.0.extend(&expressions.0));
                });
            }
        }
        batch.message(message::BATCH_END, 0, |_| ());
        batch.run(action)
    }

    fn describe(&self, chain: &mut Attributes) {
        chain.text(attribute::CHAIN_TABLE, TABLE);
        chain.text(attribute::CHAIN_NAME, self.name);
        chain.text(attribute::CHAIN_TYPE, self.kind);
        chain.nested(attribute::CHAIN_HOOK, |hook| {
            hook.number(attribute::HOOK_NUMBER, self.hook);
            hook.number(attribute::HOOK_PRIORITY, self.priority.cast_unsigned());
        });
    }
}

/// Registers of nf_tables.
pub(crate) const FIRST: u32 = 1;
pub(crate) const SECOND: u32 = 2;

/// The attributes of a message, or of another attribute. Numbers are big-endian.
#[derive(Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn add(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).expect("all values here are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(crate) fn text(&mut self, kind: u16, text: &str) {
        self.add(kind, &[text.as_bytes(), &[0]].concat());
    }

    pub(crate) fn number(&mut self, kind: u16, number: u32) {
        self.add(kind, &number.to_be_bytes());
    }

    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        const NESTED: u16 = 0x8000;
        let mut inner = Self::default();
        fill(&mut inner);
        self.add(kind | NESTED, &inner.0);
    }

    pub(crate) fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) {
        self.nested(attribute::LIST_ELEMENT, |element| {
            element.text(attribute::EXPRESSION_NAME, name);
            element.nested(attribute::EXPRESSION_DATA, fill);
        });
    }

    /// Loads bytes of a packet's header into the first register.
    pub(crate) fn load(&mut self, header: u32, offset: u32, length: u32) {
        self.expression("payload", |payload| {
            for (kind, number) in (1..).zip([FIRST, header, offset, length]) {
                payload.number(kind, number);
            }
        });
    }

    /// Ends the rule unless the first register has this value.
    pub(crate) fn compare(&mut self, value: &[u8]) {
        const EQUAL: u32 = 0;
        self.compare_by(EQUAL, value);
    }

    /// Ends the rule unless the first register has one of these values or one between them.
    pub(crate) fn compare_between(&mut self, least: [u8; 1], most: [u8; 1]) {
        const AT_MOST: u32 = 3;
        const AT_LEAST: u32 = 5;
        self.compare_by(AT_LEAST, &least);
        self.compare_by(AT_MOST, &most);
    }

    /// `operator`: NFT_CMP_*.
    fn compare_by(&mut self, operator: u32, value: &[u8]) {
        self.expression("cmp", |compare| {
            compare.number(1, FIRST);
            compare.number(2, operator);
            compare.nested(3, |data| data.add(attribute::DATA_VALUE, value));
        });
    }

    /// Loads what the kernel knows about a packet into the first register (NFT_META_*).
    pub(crate) fn meta(&mut self, key: u32) {
        self.expression("meta", |meta| {
            meta.number(1, FIRST);
            meta.number(2, key);
        });
    }

    /// Sets bits of the number in the first register, in the host's order of bytes.
    pub(crate) fn set_bits(&mut self, bits: u32) {
        self.expression("bitwise", |bitwise| {
            bitwise.number(1, FIRST);
            bitwise.number(2, FIRST);
            bitwise.number(3, 4);
            bitwise.nested(4, |mask| mask.add(attribute::DATA_VALUE, &(!bits).to_ne_bytes()));
            bitwise.nested(5, |xor| xor.add(attribute::DATA_VALUE, &bits.to_ne_bytes()));
        });
    }

    /// Ends the chain; the packet goes on.
    pub(crate) fn accept(&mut self) {
        const VERDICT_REGISTER: u32 = 0;
        const ACCEPT: u32 = 1;
        self.expression("immediate", |immediate| {
            immediate.number(1, VERDICT_REGISTER);
            immediate.nested(2, |data| {
                data.nested(attribute::DATA_VERDICT, |verdict| verdict.number(1, ACCEPT));
            });
        });
    }

    /// Loads a value into a register.
    pub(crate) fn constant(&mut self, register: u32, value: &[u8]) {
        self.expression("immediate", |immediate| {
            immediate.number(1, register);
            immediate.nested(2, |data| data.add(attribute::DATA_VALUE, value));
        });
    }
}

/// Messages that the kernel takes together.
#[derive(Debug)]
struct Batch {
    family: Family,
    bytes: Vec<u8>,
    messages: u32,
    /// The number of the last message that the kernel answers.
    answered: u32,
}

impl Batch {
    fn new(family: Family) -> Self {
        Self { family, bytes: Vec::new(), messages: 0, answered: 0 }
    }

    fn message(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) {
        let mut attributes = Attributes::default();
        fill(&mut attributes);
        self.messages += 1;
        // The ends of a batch name the subsystem, and are not answered.
        let is_end = [message::BATCH_BEGIN, message::BATCH_END].contains(&kind);
        let (family, resource, acknowledge) =
            if is_end { (0, message::NF_TABLES, 0) } else { (self.family as u8, 0, ACKNOWLEDGE) };
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

    fn run(self, action: &str) -> Result<(), NetlinkError> {
        let broken = |verb| move |source| NetlinkError::Socket { action: verb, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(broken("make"))?;
        socket.bind_auto().map_err(broken("make"))?;
        socket.set_cap_ack(true).map_err(broken("make"))?;
        socket.send_to(&self.bytes, &SocketAddr::new(0, 0), 0).map_err(broken("send to"))?;
        loop {
            let (bytes, _) = socket.recv_from_full().map_err(broken("receive from"))?;
            let mut rest = &bytes[..];
            while let Some(answer) = rest.first_chunk::<{ HEADER + 4 }>() {
                if Self::check(answer, self.answered, action)? == Some(true) {
                    return Ok(());
                }
                let length = u32::from_ne_bytes([answer[0], answer[1], answer[2], answer[3]]) as usize;
                rest = rest.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Returns whether an answer is that to the last message; None: the message is no answer.
    fn check(answer: &[u8; HEADER + 4], last: u32, action: &str) -> Result<Option<bool>, NetlinkError> {
        let number =
            |at: usize| u32::from_ne_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
        if u16::from_ne_bytes([answer[4], answer[5]]) != ANSWER {
            return Ok(None);
        }
        match number(HEADER).cast_signed() {
            0 => Ok(Some(number(8) == last)),
            error => Err(NetlinkError::Refused {
                action: action.to_owned(),
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
