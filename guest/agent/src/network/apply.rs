//! Gives an interface what the host wants it to have, and takes away what else it has.

use std::{fs, io};

use machinen_netlink::{Interface, NetlinkSocket, interfaces, packet::link::LinkAttribute};

use super::NetworkError;

/// Settings below /proc/sys/net, with values. The host decides about addresses, and it has made sure that no other host
/// has them. The kernel announces the addresses itself when the interface is switched on.
const SETTINGS: [(&str, &str, &str); 5] = [
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "accept_dad", "0"),
    // The host's link-local address is among the addresses.
    ("ipv6", "addr_gen_mode", "1"),
    ("ipv6", "ndisc_notify", "1"),
    ("ipv4", "arp_notify", "1"),
];

/// Switches an interface on, for `apply` to go on from. Returns what it has then.
///
/// # Errors
/// The kernel refuses.
pub(super) fn switch_on(socket: &mut NetlinkSocket, name: &str) -> Result<Interface, NetworkError> {
    let present = find(socket, name)?;
    prepare(name)?;
    socket.set_link(present.index, name, true, Vec::new())?;
    find(socket, name)
}

/// `announce`: the addresses are announced even if nothing changes. `known`: what the interface has, if it was switched
/// on before anything else could change it.
///
/// # Errors
/// The kernel refuses.
pub(super) fn apply(
    socket: &mut NetlinkSocket,
    wanted: &Interface,
    announce: bool,
    known: Option<Interface>,
) -> Result<(), NetworkError> {
    let present = match &known {
        Some(known) => known.clone(),
        None => find(socket, &wanted.name)?,
    };
    let mac = LinkAttribute::Address(wanted.mac.clone());
    let mut attributes = Vec::new();
    if present.mtu != wanted.mtu {
        attributes.push(LinkAttribute::Mtu(wanted.mtu));
    }
    if !present.up {
        prepare(&wanted.name)?;
        if present.mac != wanted.mac {
            attributes.push(mac.clone());
        }
    }
    if !attributes.is_empty() {
        socket.set_link(present.index, &wanted.name, present.up, attributes)?;
    }
    for address in present.addresses.iter().filter(|address| !wanted.addresses.contains(address)) {
        socket.remove_address(present.index, address)?;
    }
    for address in wanted.addresses.iter().filter(|address| !present.addresses.contains(address)) {
        socket.add_address(present.index, address)?;
    }
    if !present.up {
        socket.set_link(present.index, &wanted.name, true, Vec::new())?;
    } else if announce || present.mac != wanted.mac {
        // The kernel announces the addresses whenever the hardware address is set, also to the same one. It forgets the
        // neighbours then; the permanent ones are added again below.
        socket.set_link(present.index, &wanted.name, true, vec![mac])?;
    }
    // Routes change with addresses. No address of a known interface was removed.
    let present = if known.is_some() { present } else { find(socket, &wanted.name)? };
    for neighbour in present.neighbours.iter().filter(|neighbour| !wanted.neighbours.contains(neighbour)) {
        socket.remove_neighbour(present.index, neighbour)?;
    }
    for neighbour in wanted.neighbours.iter().filter(|neighbour| !present.neighbours.contains(neighbour)) {
        socket.add_neighbour(present.index, neighbour)?;
    }
    for route in present.routes.iter().rev().filter(|route| !wanted.routes.contains(route)) {
        socket.remove_route(present.index, route)?;
    }
    for route in wanted.routes.iter().filter(|route| !present.routes.contains(route)) {
        socket.add_route(present.index, route)?;
    }
    Ok(())
}

/// What an interface needs before it is switched on.
fn prepare(name: &str) -> Result<(), NetworkError> {
    SETTINGS.iter().try_for_each(|(kind, setting, value)| set(kind, name, setting, value))
}

fn find(socket: &mut NetlinkSocket, name: &str) -> Result<Interface, NetworkError> {
    let found = interfaces(socket)?.into_iter().find(|interface| interface.name == name);
    found.ok_or_else(|| NetworkError::Missing(name.to_owned()))
}

/// Changes a setting of an interface, if the kernel has it: one that was built without IPv6 has none for IPv6.
fn set(kind: &str, interface: &str, setting: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/net/{kind}/conf/{interface}/{setting}");
    match fs::write(&path, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(NetworkError::Setting { path, value: value.to_owned(), source }),
        Ok(()) => Ok(()),
    }
}
