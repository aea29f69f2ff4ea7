//! Reads the interfaces of a namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
        RouteVia,
    },
};

use crate::{Interface, InterfaceAddress, Neighbour, NetlinkError, NetlinkSocket, Route};

/// Lists the interfaces of the socket's namespace with their addresses, routes and permanent neighbours.
///
/// # Errors
/// The kernel refuses, or sends what cannot be read.
pub fn interfaces(socket: &mut NetlinkSocket) -> Result<Vec<Interface>, NetlinkError> {
    let mut interfaces = links(socket)?;
    let get = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    for message in socket.list(|| "list the addresses".to_owned(), get)? {
        if let RouteNetlinkMessage::NewAddress(message) = message {
            let to = find(&mut interfaces, message.header.index);
            if let Some((to, address)) = to.zip(address(&message)) {
                to.addresses.push(address);
            }
        }
    }
    let get = RouteNetlinkMessage::GetRoute(RouteMessage::default());
    for message in socket.list(|| "list the routes".to_owned(), get)? {
        if let RouteNetlinkMessage::NewRoute(message) = message {
            add_route(&mut interfaces, &message);
        }
    }
    let get = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    for message in socket.list(|| "list the neighbours".to_owned(), get)? {
        if let RouteNetlinkMessage::NewNeighbour(message) = message {
            let to = find(&mut interfaces, message.header.ifindex);
            if let Some((to, neighbour)) = to.zip(neighbour(message)) {
                to.neighbours.push(neighbour);
            }
        }
    }
    for interface in &mut interfaces {
        interface.routes.sort_by_key(|route| route.gateway.is_some());
    }
    Ok(interfaces)
}

/// Lists the interfaces without addresses, routes and neighbours.
pub(crate) fn links(socket: &mut NetlinkSocket) -> Result<Vec<Interface>, NetlinkError> {
    let get = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let messages = socket.list(|| "list the network interfaces".to_owned(), get)?;
    let link = |message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(interface(link)),
        _ => None,
    };
    Ok(messages.into_iter().filter_map(link).collect())
}

fn find(interfaces: &mut [Interface], index: u32) -> Option<&mut Interface> {
    interfaces.iter_mut().find(|interface| interface.index == index)
}

fn interface(message: LinkMessage) -> Interface {
    let flags = message.header.flags;
    let mut interface = Interface {
        index: message.header.index,
        loopback: flags.contains(LinkFlags::Loopback),
        up: flags.contains(LinkFlags::Up),
        ..Interface::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Address(mac) => interface.mac = mac,
            LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
            _ => {}
        }
    }
    interface
}

/// None: the address expires.
fn address(message: &AddressMessage) -> Option<InterfaceAddress> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut address, mut broadcast) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(*ip),
            _ => {}
        }
    }
    if !flags.contains(AddressFlags::Permanent) {
        return None;
    }
    // With both, `Local` is the interface's own address, and `Address` that of the peer.
    let own = local.or(address)?;
    Some(InterfaceAddress {
        address: own,
        prefix: message.header.prefix_len,
        broadcast,
        peer: address.filter(|&address| address != own),
        scope: message.header.scope.into(),
    })
}

fn add_route(interfaces: &mut [Interface], message: &RouteMessage) {
    let mut table = u32::from(message.header.table);
    let mut interface = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => interface = Some(*index),
            RouteAttribute::MultiPath(hops) if table == u32::from(RouteHeader::RT_TABLE_MAIN) => {
                for hop in hops {
                    if let Some(interface) = find(interfaces, hop.interface_index) {
                        interface.shared_routes += 1;
                    }
                }
            }
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || message.header.flags.contains(RouteFlags::Cloned) {
        return;
    }
    let to = interface.and_then(|index| find(interfaces, index));
    if let Some((to, route)) = to.zip(route(message)) {
        to.routes.push(route);
    }
}

/// None: the route is not one to a host or network, or was learned from a router.
fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    if header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Ra {
        return None;
    }
    let mut route = Route {
        destination: any,
        prefix: header.destination_prefix_length,
        gateway: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        source: None,
        metric: 0,
        scope: header.scope.into(),
        protocol: header.protocol.into(),
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = Some(ip(address)?),
            RouteAttribute::Via(RouteVia::Inet(address)) => route.gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => route.source = Some(ip(address)?),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbour(message: NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(ip.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(ip.into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes),
            _ => {}
        }
    }
    address.zip(mac).map(|(address, mac)| Neighbour { address, mac })
}
