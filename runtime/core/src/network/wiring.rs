//! Redirects the packets that arrive at one interface to another one, by traffic control (tc(8)).
//!
//! The redirection is made of filters of the queueing discipline `clsact` (or `ingress`, if the interface has that
//! already), with priorities of their own by which they are found again. Filters that others have on the interface stay.
//!
//! Packets of the guest are redirected only if they come from the guest's own addresses.

use std::net::IpAddr;

use machinen_netlink::{
    NetlinkError, NetlinkSocket, flags,
    packet::{
        RouteNetlinkMessage,
        tc::{TcAction, TcAttribute, TcHandle, TcMessage},
    },
};

use super::filter::{self, Sources};

/// A priority and the protocol that all filters of this priority have.
#[derive(Debug, Clone, Copy)]
struct Rank {
    priority: u32,
    protocol: u16,
}

/// The priorities begin with "mn". Protocols are those of linux/if_ether.h.
const IPV4: Rank = Rank { priority: 0x6d6e, protocol: 0x0800 };
const ARP: Rank = Rank { priority: 0x6d6f, protocol: 0x0806 };
const IPV6: Rank = Rank { priority: 0x6d70, protocol: 0x86dd };
const EVERYTHING: Rank = Rank { priority: 0x6d71, protocol: 3 };
const RANKS: [Rank; 4] = [IPV4, ARP, IPV6, EVERYTHING];
/// The ranks of the filters that depend on the guest's addresses.
const OWN: [Rank; 3] = [IPV4, ARP, IPV6];
/// The ranks of the filters that drop resets.
const RESETS: [Rank; 2] =
    [Rank { priority: 0x6d72, protocol: 0x0800 }, Rank { priority: 0x6d73, protocol: 0x86dd }];

/// The kernel gives the loopback interface of each namespace this number.
const LOOPBACK: u32 = 1;

const QDISC: TcHandle = TcHandle { major: u16::MAX, minor: 0 };
const ARRIVING: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
const LEAVING: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };

/// What happens to the packets that a guest may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Onward {
    /// They leave through this interface.
    To(u32),
    /// They enter the network code of the namespace. Packets of ARP do not: the namespace asks the guest nothing, and the
    /// guest must not answer for others.
    Routed,
}

impl Onward {
    fn action(self) -> Option<TcAction> {
        match self {
            Self::To(interface) => Some(filter::redirect(interface)),
            Self::Routed => None,
        }
    }
}

/// There is no such filter, no queueing discipline, or no such interface.
const GONE: [i32; 3] = [libc::ENOENT, libc::EINVAL, libc::ENODEV];

/// Redirects all packets that arrive at the interface `from`: they leave through `to`.
///
/// # Errors
/// The kernel refuses, or has no such filters.
pub(super) fn redirect_all(socket: &mut NetlinkSocket, from: u32, to: u32) -> Result<(), NetlinkError> {
    add_qdisc(socket, from)?;
    // A kernel has one of the two kinds of filters, or both.
    match add(socket, from, ARRIVING, EVERYTHING, filter::u32(&[], filter::redirect(to))) {
        Err(error) if error.errno() == Some(libc::ENOENT) => {
            add(socket, from, ARRIVING, EVERYTHING, filter::matchall(filter::redirect(to)))
        }
        added => added,
    }
}

/// Admits the packets that a guest sends from its own addresses, and no others.
///
/// # Errors
/// The kernel refuses, or has no such filters.
pub(super) fn admit_own(
    socket: &mut NetlinkSocket,
    tap: u32,
    onward: Onward,
    sources: &Sources,
) -> Result<(), NetlinkError> {
    add_qdisc(socket, tap)?;
    // The last filter is the first to exist: no packet of the guest reaches the host's own network code meanwhile.
    match add(socket, tap, ARRIVING, EVERYTHING, filter::u32(&[], filter::discard())) {
        // A kernel without that action: what the guest must not send returns to the guest.
        Err(error) if error.errno() == Some(libc::ENOENT) => {
            add(socket, tap, ARRIVING, EVERYTHING, filter::u32(&[], filter::redirect(tap)))?;
        }
        added => added?,
    }
    add_own(socket, tap, onward, sources)
}

/// Replaces the addresses from which a guest may send, after [`admit_own`]. Nothing leaves meanwhile.
///
/// # Errors
/// The kernel refuses.
pub(super) fn replace_own(
    socket: &mut NetlinkSocket,
    tap: u32,
    onward: Onward,
    sources: &Sources,
) -> Result<(), NetlinkError> {
    for rank in OWN {
        remove(socket, tap, ARRIVING, rank)?;
    }
    add_own(socket, tap, onward, sources)
}

fn add_own(
    socket: &mut NetlinkSocket,
    tap: u32,
    onward: Onward,
    sources: &Sources,
) -> Result<(), NetlinkError> {
    let sender = filter::sender(sources.mac);
    for &address in &sources.addresses {
        let own = match address {
            IpAddr::V4(address) => {
                if let Onward::To(to) = onward {
                    let arp = [sender.clone(), filter::arp_sender(sources.mac, address)].concat();
                    add(socket, tap, ARRIVING, ARP, filter::u32(&arp, filter::redirect(to)))?;
                }
                (IPV4, filter::source4(address))
            }
            IpAddr::V6(address) => (IPV6, filter::source6(address)),
        };
        let (rank, source) = own;
        let keys = [sender.clone(), source].concat();
        add(socket, tap, ARRIVING, rank, filter::u32(&keys, onward.action()))?;
    }
    Ok(())
}

/// Drops the resets of connections (TCP) that leave through the interface, which the host's own network code sends for
/// connections that it does not know. They leave through the loopback interface instead, where they are dropped because
/// they have the hardware address of another host; not every kernel can drop packets in a filter.
///
/// # Errors
/// The kernel refuses.
pub(super) fn drop_resets(socket: &mut NetlinkSocket, interface: u32) -> Result<(), NetlinkError> {
    add_qdisc(socket, interface)?;
    for (rank, keys) in RESETS.into_iter().zip([filter::reset4(), filter::reset6()]) {
        remove(socket, interface, LEAVING, rank)?;
        add(socket, interface, LEAVING, rank, filter::u32(&keys, filter::redirect(LOOPBACK)))?;
    }
    Ok(())
}

/// Undoes [`drop_resets`]. Does nothing if that was not done.
///
/// # Errors
/// The kernel refuses.
pub(super) fn pass_resets(socket: &mut NetlinkSocket, interface: u32) -> Result<(), NetlinkError> {
    remove_all(socket, interface, LEAVING, &RESETS)
}

/// Removes the redirection, and the queueing discipline if nothing else uses it. Does nothing if the interface or the
/// redirection does not exist.
///
/// # Errors
/// The kernel refuses.
pub(super) fn disconnect(socket: &mut NetlinkSocket, interface: u32) -> Result<(), NetlinkError> {
    remove_all(socket, interface, ARRIVING, &RANKS)
}

fn remove_all(
    socket: &mut NetlinkSocket,
    interface: u32,
    side: TcHandle,
    ranks: &[Rank],
) -> Result<(), NetlinkError> {
    let mut removed = false;
    for &rank in ranks {
        removed |= remove(socket, interface, side, rank)?;
    }
    if !removed {
        return Ok(());
    }
    for side in [ARRIVING, LEAVING] {
        let list = RouteNetlinkMessage::GetTrafficFilter(message(interface, side));
        let others = socket.list(|| format!("list the filters of network interface {interface}"), list)?;
        if !others.is_empty() {
            return Ok(());
        }
    }
    let mut qdisc = message(interface, TcHandle::CLSACT);
    qdisc.header.handle = QDISC;
    let action = || format!("remove the queueing discipline of network interface {interface}");
    is_gone(socket.change(action, RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0)).map(drop)
}

/// Removes the filters of one rank, and returns whether there were any.
fn remove(
    socket: &mut NetlinkSocket,
    interface: u32,
    side: TcHandle,
    rank: Rank,
) -> Result<bool, NetlinkError> {
    let filter = RouteNetlinkMessage::DelTrafficFilter(filters(interface, side, rank));
    let action = || format!("remove a filter of packets from network interface {interface}");
    is_gone(socket.change(action, filter, 0)).map(|gone| !gone)
}

/// Whether what is to be removed did not exist.
fn is_gone(removed: Result<(), NetlinkError>) -> Result<bool, NetlinkError> {
    match removed {
        Err(error) if error.errno().is_some_and(|errno| GONE.contains(&errno)) => Ok(true),
        removed => removed.map(|()| false),
    }
}

fn add_qdisc(socket: &mut NetlinkSocket, interface: u32) -> Result<(), NetlinkError> {
    let mut qdisc = message(interface, TcHandle::CLSACT);
    qdisc.header.handle = QDISC;
    qdisc.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    let action = || format!("add a queueing discipline to network interface {interface}");
    let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
    match socket.change(action, message, flags::CREATE | flags::EXCLUSIVE) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        added => added,
    }
}

fn add(
    socket: &mut NetlinkSocket,
    interface: u32,
    side: TcHandle,
    rank: Rank,
    attributes: Vec<TcAttribute>,
) -> Result<(), NetlinkError> {
    let mut filter = filters(interface, side, rank);
    filter.attributes = attributes;
    let action = || format!("filter the packets of network interface {interface}");
    socket.change(action, RouteNetlinkMessage::NewTrafficFilter(filter), flags::CREATE | flags::EXCLUSIVE)
}

/// Names the filters of one rank at one side of the interface.
fn filters(interface: u32, side: TcHandle, rank: Rank) -> TcMessage {
    let mut filter = message(interface, side);
    filter.header.info = rank.priority << 16 | u32::from(rank.protocol.to_be());
    filter
}

fn message(interface: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = parent;
    message
}
