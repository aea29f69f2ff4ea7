//! Filters of traffic control (tc(8)) as messages: which packets they match, and what happens to those.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use machinen_netlink::packet::{
    other_attribute,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
        TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32, TcFilterU32Option, TcMirror,
        TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};

/// The number of TCP among the protocols above IP.
const TCP: u8 = 6;

/// What a filter matches: 32 bits at an offset from the network header, of which the mask's count. The header of
/// Ethernet is before the network header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    offset: i32,
    value: u32,
    mask: u32,
}

/// The hardware address of a packet's sender.
pub(super) fn sender(mac: [u8; 6]) -> Vec<Key> {
    let [a, b, c, d, e, f] = mac;
    vec![word(-8, [a, b, c, d]), Key { mask: 0xffff_0000, ..word(-4, [e, f, 0, 0]) }]
}

/// The source address of a packet of IPv4.
pub(super) fn source4(address: Ipv4Addr) -> Vec<Key> {
    vec![word(12, address.octets())]
}

/// The source address of a packet of IPv6.
pub(super) fn source6(address: Ipv6Addr) -> Vec<Key> {
    let octets = address.octets();
    let (words, _) = octets.as_chunks::<4>();
    [8, 12, 16, 20].into_iter().zip(words).map(|(offset, bytes)| word(offset, *bytes)).collect()
}

/// The addresses of the sender of an ARP packet.
pub(super) fn arp_sender(mac: [u8; 6], address: Ipv4Addr) -> Vec<Key> {
    let ([a, b, c, d, e, f], [i, j, k, l]) = (mac, address.octets());
    vec![word(8, [a, b, c, d]), word(12, [e, f, i, j]), Key { mask: 0xffff_0000, ..word(16, [k, l, 0, 0]) }]
}

/// A packet of TCP over IPv4, without options of IPv4, that resets a connection.
pub(super) fn reset4() -> Vec<Key> {
    const HEADER: i32 = 20;
    vec![
        // Version and length of the header.
        Key { mask: 0xff00_0000, ..word(0, [0x45, 0, 0, 0]) },
        Key { mask: 0x00ff_0000, ..word(8, [0, TCP, 0, 0]) },
        reset(HEADER),
    ]
}

/// A packet of TCP over IPv6, without extension headers, that resets a connection.
pub(super) fn reset6() -> Vec<Key> {
    const HEADER: i32 = 40;
    vec![Key { mask: 0x0000_ff00, ..word(4, [0, 0, TCP, 0]) }, reset(HEADER)]
}

/// The flag of a reset in the header of TCP at this offset.
fn reset(offset: i32) -> Key {
    const FLAG: u32 = 0x0004_0000;
    Key { offset: offset + 12, value: FLAG, mask: FLAG }
}

fn word(offset: i32, bytes: [u8; 4]) -> Key {
    Key { offset, value: u32::from_be_bytes(bytes), mask: u32::MAX }
}

/// A filter of the kind u32. Without keys it matches everything. Without an action the packets go on.
pub(super) fn u32(keys: &[Key], action: impl Into<Option<TcAction>>) -> Vec<TcAttribute> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    let all = [Key { offset: 0, value: 0, mask: 0 }];
    for key in if keys.is_empty() { &all } else { keys } {
        let mut raw = TcU32Key::default();
        // In the order of bytes of the network.
        raw.val = key.value.to_be();
        raw.mask = key.mask.to_be();
        raw.off = key.offset;
        selector.keys.push(raw);
        selector.nkeys += 1;
    }
    let mut options = vec![TcFilterU32Option::Selector(selector)];
    options.extend(action.into().map(|action| TcFilterU32Option::Action(vec![action])));
    vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(options.into_iter().map(TcOption::U32).collect()),
    ]
}

/// A filter of the kind matchall, which matches everything.
pub(super) fn matchall(action: TcAction) -> Vec<TcAttribute> {
    let option = TcFilterMatchAllOption::Action(vec![action]);
    vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(option)]),
    ]
}

/// The packet leaves through the interface `to`, and nothing else happens to it.
pub(super) fn redirect(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let option = TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror));
    action(TcActionMirror::KIND, option)
}

/// The packet is dropped.
pub(super) fn discard() -> TcAction {
    // struct tc_gact: index, capabilities, action, two counts of references (linux/tc_act/tc_gact.h).
    const PARAMETERS: u16 = 2;
    const SHOT: u32 = 2;
    let parameters: Vec<u8> = [0, 0, SHOT, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    action("gact", TcActionOption::Other(other_attribute(PARAMETERS, parameters)))
}

fn action(kind: &str, option: TcActionOption) -> TcAction {
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes =
        vec![TcActionAttribute::Kind(kind.to_owned()), TcActionAttribute::Options(vec![option])];
    action
}

/// The addresses from which a guest may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sources {
    pub(super) mac: [u8; 6],
    pub(super) addresses: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cover_the_addresses() {
        let mac = [2, 3, 4, 5, 6, 7];
        assert_eq!(
            sender(mac),
            [
                Key { offset: -8, value: 0x0203_0405, mask: u32::MAX },
                Key { offset: -4, value: 0x0607_0000, mask: 0xffff_0000 },
            ]
        );
        assert_eq!(
            arp_sender(mac, Ipv4Addr::new(10, 0, 0, 9)),
            [
                Key { offset: 8, value: 0x0203_0405, mask: u32::MAX },
                Key { offset: 12, value: 0x0607_0a00, mask: u32::MAX },
                Key { offset: 16, value: 0x0009_0000, mask: 0xffff_0000 },
            ]
        );
        let words: Vec<_> =
            source6("fd00::1:2".parse().unwrap()).iter().map(|key| (key.offset, key.value)).collect();
        assert_eq!(words, [(8, 0xfd00_0000), (12, 0), (16, 0), (20, 0x0001_0002)]);
    }
}
