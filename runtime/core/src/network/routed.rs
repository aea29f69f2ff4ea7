//! The routed mode: packets of a guest pass the network code of the pod's namespace, and with it the rules that others
//! have there (nft(8), iptables(8), ip-rule(8)), as a service mesh or a network policy needs.
//!
//! ```text
//!   host's network ── veth ── eth0 ── the namespace's routes and rules ── tap ── QEMU ── guest's eth0
//!                             10.0.0.2          169.254.0.1, fe80::1 ──┘                 10.0.0.2/32 via 169.254.0.1
//! ```
//! The namespace keeps its addresses, which the guest has too. So the guest's packets are told from the namespace's own:
//! - The tap admits what comes from the guest's own addresses only.
//! - A packet that arrives for an address, and that no socket of the namespace is for, gets a mark, and a rule leads it to
//!   the tap. The namespace's own sockets, such as those of a proxy that the packets were redirected to, come first.
//! - What the namespace's own sockets send to an address goes to the tap.
//!
//! These rules must be asked before the table of the namespace's own addresses, which the kernel asks first. So the rule of
//! that table gets a later place for as long as the guest is connected. All rules have an owner of their own, by which they
//! are found again after a process was killed. Both sides know each other's hardware addresses and ask for none.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use machinen_base::netns;
use machinen_netlink::{
    Interface, InterfaceAddress, IpVersion, LOCAL_TABLE, Neighbour, NetlinkError, NetlinkSocket, Route,
    RoutingRule, mark_arrivals,
};

use super::NetworkError;

/// The tap's addresses, by which the guest reaches everything.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The table of routes to the guest, and the bit in the marks of packets that it is for.
const TABLE: u32 = 0x6d6e;
const MARK: u32 = 0x1000_0000;
/// The owner of the rules and routes.
const OWNER: u8 = 0x6d;
/// The places of the rules: the kernel's own are at 0 (the namespace's addresses), 32766 and 32767.
const KERNELS: u32 = 0;
const OURS: u32 = 1;
const AFTER_OURS: u32 = 2;
/// The owner of the kernel's rules (linux/rtnetlink.h, RTPROT_KERNEL).
const KERNEL: u8 = 2;

/// The scopes of addresses and routes (linux/rtnetlink.h).
const GLOBAL: u8 = 0;
const LINK: u8 = 253;
/// An administrator has made the route (linux/rtnetlink.h, RTPROT_STATIC).
const STATIC: u8 = 4;
/// A value of the setting addr_gen_mode (linux/if_link.h, IN6_ADDR_GEN_MODE_NONE).
const NO_ADDRESS: &str = "1";
/// The metric that the kernel gives to routes of IPv6.
const METRIC6: u32 = 1024;

/// The two ends of the way, in the namespace of the pod.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends<'a> {
    pub(super) namespace: BorrowedFd<'a>,
    /// The namespace's interface, by its name and number.
    pub(super) interface: &'a str,
    pub(super) index: u32,
    /// The VM's device, by its name and number.
    pub(super) tap_name: &'a str,
    pub(super) tap: u32,
    /// The hardware address of the guest.
    pub(super) guest_mac: [u8; 6],
}

/// What is routed to a guest.
#[derive(Debug, Default)]
pub(super) struct RoutedGuest {
    addresses: Vec<IpAddr>,
    /// Packets get marks.
    marked: bool,
    /// Settings that were changed, with their earlier values.
    changed: Vec<(String, String)>,
}

/// The addresses of the namespace's interface that a guest has in this mode: those that are valid beyond the link.
pub(super) fn addresses(interface: &Interface) -> Vec<IpAddr> {
    let all = interface.addresses.iter().map(|address| address.address);
    all.filter(|address| !matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())).collect()
}

/// What the guest gets: each address alone, and everything else behind the gateway.
pub(super) fn guest_interface(interface: &Interface, gateway_mac: &[u8]) -> Interface {
    let own = addresses(interface);
    let address = |&address: &IpAddr| InterfaceAddress {
        address,
        prefix: whole(address),
        broadcast: None,
        peer: None,
        scope: GLOBAL,
    };
    let gateways = [IpAddr::from(GATEWAY), GATEWAY6.into()];
    let gateways = gateways.into_iter().filter(|gateway| has(&own, IpVersion::of(*gateway)));
    let neighbour = |address| Neighbour { address, mac: gateway_mac.to_vec() };
    Interface {
        addresses: own.iter().map(address).collect(),
        neighbours: gateways.clone().map(neighbour).collect(),
        routes: gateways.clone().map(to_gateway).chain(gateways.map(by_gateway)).collect(),
        shared_routes: 0,
        ..interface.clone()
    }
}

impl RoutedGuest {
    /// Leads packets for these addresses to the guest, and for no others.
    ///
    /// # Errors
    /// The kernel refuses. What was done is undone by [`RoutedGuest::end`].
    pub(super) fn route(
        &mut self,
        socket: &mut NetlinkSocket,
        ends: Ends<'_>,
        wanted: &[IpAddr],
    ) -> Result<(), NetworkError> {
        // A kernel that cannot do this can do nothing of the rest. Without the rules the marks mean nothing.
        self.marked |= !wanted.is_empty();
        if self.marked {
            mark(ends.namespace, ends.index, wanted)?;
        }
        for version in [IpVersion::V4, IpVersion::V6] {
            if has(wanted, version) && !has(&self.addresses, version) {
                self.forward(ends, version)?;
                prepare(socket, ends, version)?;
            }
        }
        for &address in wanted {
            // The hardware address may be another one.
            let mac = ends.guest_mac.to_vec();
            socket.add_neighbour(ends.tap, &Neighbour { address, mac })?;
            if !self.addresses.contains(&address) {
                self.addresses.push(address);
                socket.add_route_to(TABLE, ends.tap, &to_guest(address))?;
                rules(ends.interface, address).iter().try_for_each(|rule| socket.add_rule(rule))?;
            }
        }
        for address in self.addresses.extract_if(.., |address| !wanted.contains(address)) {
            rules(ends.interface, address).iter().try_for_each(|rule| socket.remove_rule(rule))?;
            socket.remove_route_from(TABLE, ends.tap, &to_guest(address))?;
        }
        Ok(())
    }

    /// Has the namespace forward packets between the two ends.
    fn forward(&mut self, ends: Ends<'_>, version: IpVersion) -> Result<(), NetworkError> {
        let changed = netns::inside(ends.namespace, || Ok(set(&settings(ends, version))));
        let (changed, result) = changed.map_err(NetworkError::Enter)?;
        self.changed.extend(changed);
        result
    }

    /// Removes everything. Does nothing where it is gone already.
    ///
    /// # Errors
    /// The first error of the kernel; the rest is removed nevertheless.
    pub(super) fn end(
        &mut self,
        socket: &mut NetlinkSocket,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), NetworkError> {
        let Self { changed, marked, .. } = std::mem::take(self);
        let removed = remove_rules(socket, namespace).and_then(|found| match found {
            false if marked => mark(namespace, 0, &[]),
            _ => Ok(()),
        });
        let restored = netns::inside(namespace, || Ok(restore(&changed))).map_err(NetworkError::Enter);
        removed.and(restored?)
    }
}

/// Keeps the kernel from giving the device an address when it is switched on.
///
/// # Errors
/// The kernel refuses.
pub(super) fn without_own_addresses(ends: Ends<'_>) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/ipv6/conf/{}/addr_gen_mode", ends.tap_name);
    let set = || match fs::write(&path, NO_ADDRESS) {
        // The kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ok(())),
        set => Ok(set),
    };
    let set = netns::inside(ends.namespace, set).map_err(NetworkError::Enter)?;
    set.map_err(|source| NetworkError::Setting { path, value: NO_ADDRESS.to_owned(), source })
}

/// Removes the addresses of the device that stay when it is switched off.
///
/// # Errors
/// The kernel refuses, except where they are gone already.
pub(super) fn take_addresses(socket: &mut NetlinkSocket, tap: u32) -> Result<(), NetlinkError> {
    match socket.remove_address(tap, &gateway_address(GATEWAY.into())) {
        Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => Ok(()),
        removed => removed,
    }
}

/// Removes the rules that lead packets to a guest, and returns whether there were any.
///
/// # Errors
/// The kernel refuses.
pub(super) fn remove_rules(
    socket: &mut NetlinkSocket,
    namespace: BorrowedFd<'_>,
) -> Result<bool, NetworkError> {
    let mut found = false;
    for version in [IpVersion::V4, IpVersion::V6] {
        let ours = socket.rules(version)?;
        let ours: Vec<_> = ours.into_iter().filter(|rule| rule.owner == OWNER).collect();
        if ours.iter().any(|rule| rule.table == LOCAL_TABLE) {
            socket.add_rule(&local_rule(version, KERNELS, KERNEL))?;
        }
        ours.iter().try_for_each(|rule| socket.remove_rule(rule))?;
        found |= !ours.is_empty();
    }
    if found {
        mark(namespace, 0, &[])?;
    }
    Ok(found)
}

fn mark(namespace: BorrowedFd<'_>, interface: u32, addresses: &[IpAddr]) -> Result<(), NetworkError> {
    let marked = netns::inside(namespace, || Ok(mark_arrivals(interface, addresses, MARK)));
    marked.map_err(NetworkError::Enter)?.map_err(NetworkError::Mark)
}

/// What one kind of addresses needs besides the addresses themselves.
fn prepare(socket: &mut NetlinkSocket, ends: Ends<'_>, version: IpVersion) -> Result<(), NetlinkError> {
    let gateway = match version {
        IpVersion::V4 => GATEWAY.into(),
        IpVersion::V6 => GATEWAY6.into(),
    };
    socket.add_address(ends.tap, &gateway_address(gateway))?;
    let rules = socket.rules(version)?;
    let mut firsts = rules.iter().filter(|rule| rule.table == LOCAL_TABLE && rule.priority == KERNELS);
    if let Some(first) = firsts.next() {
        socket.add_rule(&local_rule(version, AFTER_OURS, OWNER))?;
        socket.remove_rule(first)?;
    }
    Ok(())
}

fn gateway_address(address: IpAddr) -> InterfaceAddress {
    InterfaceAddress { address, prefix: whole(address), broadcast: None, peer: None, scope: LINK }
}

/// The rules that lead packets to the guest.
fn rules(interface: &str, address: IpAddr) -> [RoutingRule; 2] {
    let rule = |arriving_at: &str, mark| RoutingRule {
        version: IpVersion::of(address),
        priority: OURS,
        to: Some(address),
        arriving_at: Some(arriving_at.to_owned()),
        mark,
        table: TABLE,
        owner: OWNER,
    };
    [rule("lo", None), rule(interface, Some(MARK))]
}

/// The rule for the namespace's own addresses.
fn local_rule(version: IpVersion, priority: u32, owner: u8) -> RoutingRule {
    RoutingRule { version, priority, to: None, arriving_at: None, mark: None, table: LOCAL_TABLE, owner }
}

/// The namespace's own sockets send from the gateway's address: the guest would take its own for a forged one.
fn to_guest(address: IpAddr) -> Route {
    let source = if address.is_ipv4() { GATEWAY.into() } else { GATEWAY6.into() };
    Route { source: Some(source), protocol: OWNER, ..direct(address) }
}

fn to_gateway(gateway: IpAddr) -> Route {
    direct(gateway)
}

/// A route to one address, without a gateway.
fn direct(address: IpAddr) -> Route {
    let (metric, scope) = if address.is_ipv4() { (0, LINK) } else { (METRIC6, GLOBAL) };
    Route {
        destination: address,
        prefix: whole(address),
        gateway: None,
        onlink: false,
        source: None,
        metric,
        scope,
        protocol: STATIC,
    }
}

fn by_gateway(gateway: IpAddr) -> Route {
    let any: IpAddr =
        if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Route {
        destination: any,
        prefix: 0,
        gateway: Some(gateway),
        onlink: gateway.is_ipv4(),
        scope: GLOBAL,
        ..direct(gateway)
    }
}

fn whole(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn has(addresses: &[IpAddr], version: IpVersion) -> bool {
    addresses.iter().any(|&address| IpVersion::of(address) == version)
}

/// Settings below /proc/sys/net, with values.
fn settings(ends: Ends<'_>, version: IpVersion) -> Vec<(String, &'static str)> {
    let Ends { interface, tap_name, .. } = ends;
    match version {
        IpVersion::V4 => vec![
            (format!("/proc/sys/net/ipv4/conf/{interface}/forwarding"), "1"),
            (format!("/proc/sys/net/ipv4/conf/{tap_name}/forwarding"), "1"),
            // The guest's address is one of the namespace's, which has a route elsewhere. The filters at the tap have made
            // sure of the address, more than the kernel's own check would.
            (format!("/proc/sys/net/ipv4/conf/{tap_name}/accept_local"), "1"),
            (format!("/proc/sys/net/ipv4/conf/{tap_name}/rp_filter"), "2"),
        ],
        IpVersion::V6 => vec![
            // An interface that learns from routers would cease to, now that it forwards.
            (format!("/proc/sys/net/ipv6/conf/{interface}/accept_ra"), "2"),
            (format!("/proc/sys/net/ipv6/conf/{tap_name}/disable_ipv6"), "0"),
            // IPv6 has no such setting for one interface.
            ("/proc/sys/net/ipv6/conf/all/forwarding".to_owned(), "1"),
        ],
    }
}

/// Changes settings of this thread's namespace. Returns the earlier values of those that were others.
fn set(settings: &[(String, &'static str)]) -> (Vec<(String, String)>, Result<(), NetworkError>) {
    let mut changed = Vec::new();
    for (path, value) in settings {
        let failed =
            |source| NetworkError::Setting { path: path.clone(), value: (*value).to_owned(), source };
        let earlier = match fs::read_to_string(path).map_err(failed) {
            Ok(earlier) => earlier.trim().to_owned(),
            Err(error) => return (changed, Err(error)),
        };
        // Only an interface that learns from routers must go on to do so.
        if earlier == *value || path.ends_with("accept_ra") && earlier != "1" {
            continue;
        }
        if let Err(error) = fs::write(path, value).map_err(failed) {
            return (changed, Err(error));
        }
        changed.push((path.clone(), earlier));
    }
    (changed, Ok(()))
}

/// Restores settings of this thread's namespace, the last ones first. An interface may have disappeared.
fn restore(changed: &[(String, String)]) -> Result<(), NetworkError> {
    let mut result = Ok(());
    for (path, value) in changed.iter().rev() {
        match fs::write(path, value) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                let (path, value) = (path.clone(), value.clone());
                result = result.and(Err(NetworkError::Setting { path, value, source }));
            }
            _ => {}
        }
    }
    result
}
