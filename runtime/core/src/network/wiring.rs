//! Redirects the packets that arrive at one interface to another one, by traffic control (tc(8)).
//!
//! The redirection is a filter of the queueing discipline `clsact` (or `ingress`, if the interface has that already), with
//! a priority of its own by which it is found again. Filters that others have on the interface stay.

use machinen_netlink::{
    NetlinkError, NetlinkSocket, flags,
    packet::{
        RouteNetlinkMessage,
        tc::{
            TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
            TcAttribute, TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32, TcFilterU32Option, TcHandle,
            TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
        },
    },
};

/// The priority of the filter: "mn".
const PRIORITY: u32 = 0x6d6e;
/// Packets of every protocol (ETH_P_ALL).
const EVERY_PROTOCOL: u16 = 3;
const QDISC: TcHandle = TcHandle { major: u16::MAX, minor: 0 };
const ARRIVING: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
const LEAVING: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };

/// Redirects all packets that arrive at `from`: they leave through `to`.
///
/// # Errors
/// The kernel refuses, or has no such filters.
pub(super) fn connect_one_way(socket: &mut NetlinkSocket, from: u32, to: u32) -> Result<(), NetlinkError> {
    let mut qdisc = message(from, TcHandle::CLSACT);
    qdisc.header.handle = QDISC;
    qdisc.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    let action = || format!("add a queueing discipline to network interface {from}");
    let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
    match socket.change(action, message, flags::CREATE | flags::EXCLUSIVE) {
        Err(error) if error.errno() == Some(libc::EEXIST) => {}
        added => added?,
    }
    // A kernel has one of the two kinds of filters, or both.
    match add_filter(socket, from, u32_redirect(to)) {
        Err(error) if error.errno() == Some(libc::ENOENT) => add_filter(socket, from, matchall_redirect(to)),
        added => added,
    }
}

/// Removes the redirection, and the queueing discipline if nothing else uses it. Does nothing if the interface or the
/// redirection does not exist.
///
/// # Errors
/// The kernel refuses.
pub(super) fn disconnect_one_way(socket: &mut NetlinkSocket, from: u32) -> Result<(), NetlinkError> {
    let filter = filter(from);
    let action = || format!("remove the redirection of packets from network interface {from}");
    match socket.change(action, RouteNetlinkMessage::DelTrafficFilter(filter), 0) {
        // There is no such filter, no queueing discipline, or no such interface.
        Err(error) if error.errno().is_some_and(|errno| GONE.contains(&errno)) => return Ok(()),
        removed => removed?,
    }
    for side in [ARRIVING, LEAVING] {
        let list = RouteNetlinkMessage::GetTrafficFilter(message(from, side));
        let others = socket.list(|| format!("list the filters of network interface {from}"), list)?;
        if !others.is_empty() {
            return Ok(());
        }
    }
    let mut qdisc = message(from, TcHandle::CLSACT);
    qdisc.header.handle = QDISC;
    let action = || format!("remove the queueing discipline of network interface {from}");
    match socket.change(action, RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0) {
        Err(error) if error.errno().is_some_and(|errno| GONE.contains(&errno)) => Ok(()),
        removed => removed,
    }
}

const GONE: [i32; 3] = [libc::ENOENT, libc::EINVAL, libc::ENODEV];

fn message(interface: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = parent;
    message
}

/// Names the filter of this module at the interface.
fn filter(interface: u32) -> TcMessage {
    let mut filter = message(interface, ARRIVING);
    filter.header.info = PRIORITY << 16 | u32::from(EVERY_PROTOCOL.to_be());
    filter
}

fn add_filter(
    socket: &mut NetlinkSocket,
    from: u32,
    attributes: Vec<TcAttribute>,
) -> Result<(), NetlinkError> {
    let mut filter = filter(from);
    filter.attributes = attributes;
    let action = || format!("redirect the packets of network interface {from}");
    socket.change(action, RouteNetlinkMessage::NewTrafficFilter(filter), flags::CREATE | flags::EXCLUSIVE)
}

/// A filter of the kind u32 whose one key matches everything.
fn u32_redirect(to: u32) -> Vec<TcAttribute> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let options =
        vec![TcFilterU32Option::Selector(selector), TcFilterU32Option::Action(vec![redirection(to)])];
    vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(options.into_iter().map(TcOption::U32).collect()),
    ]
}

fn matchall_redirect(to: u32) -> Vec<TcAttribute> {
    let option = TcFilterMatchAllOption::Action(vec![redirection(to)]);
    vec![
        TcAttribute::Kind(TcFilterMatchAll::KIND.to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(option)]),
    ]
}

/// The packet leaves through `to`, and nothing else happens to it.
fn redirection(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}
