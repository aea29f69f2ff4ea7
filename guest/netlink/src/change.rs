//! Changes interfaces, their addresses, routes and neighbours.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType, RouteVia},
};

use crate::{InterfaceAddress, Neighbour, NetlinkError, NetlinkSocket, Route, flags};

impl NetlinkSocket {
    /// Moves an interface to another namespace, under a new name.
    ///
    /// # Errors
    /// The interface does not exist, or the other namespace has one of that name (EEXIST).
    pub fn move_to(
        &mut self,
        interface: &str,
        namespace: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        let found = crate::read::links(self)?.into_iter().find(|found| found.name == interface);
        message.header.index = found.map_or(0, |found| found.index);
        message.attributes =
            vec![LinkAttribute::NetNsFd(namespace.as_raw_fd()), LinkAttribute::IfName(name.to_owned())];
        self.change(
            || format!("move the network interface {interface} to another namespace as {name}"),
            RouteNetlinkMessage::SetLink(message),
            0,
        )
    }

    /// Sets attributes of an interface, and switches it on or off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_link(
        &mut self,
        index: u32,
        name: &str,
        up: bool,
        attributes: Vec<LinkAttribute>,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        message.attributes = attributes;
        self.change(
            || format!("change the network interface {name}"),
            RouteNetlinkMessage::SetLink(message),
            0,
        )
    }

    /// Adds an address. No route is added with it, and nothing is sent to find out whether another host has it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_address(&mut self, interface: u32, address: &InterfaceAddress) -> Result<(), NetlinkError> {
        let action = || format!("add the address {}/{}", address.address, address.prefix);
        let message = RouteNetlinkMessage::NewAddress(address_message(interface, address));
        self.change(action, message, flags::CREATE | flags::REPLACE)
    }

    /// Removes an address.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_address(&mut self, interface: u32, address: &InterfaceAddress) -> Result<(), NetlinkError> {
        let action = || format!("remove the address {}/{}", address.address, address.prefix);
        self.change(action, RouteNetlinkMessage::DelAddress(address_message(interface, address)), 0)
    }

    /// Adds a route to the main table.
    ///
    /// # Errors
    /// The kernel refuses, as when no route leads to the gateway.
    pub fn add_route(&mut self, interface: u32, route: &Route) -> Result<(), NetlinkError> {
        self.add_route_to(RouteHeader::RT_TABLE_MAIN.into(), interface, route)
    }

    /// Adds a route to the table of this number.
    ///
    /// # Errors
    /// The kernel refuses, as when no route leads to the gateway.
    pub fn add_route_to(&mut self, table: u32, interface: u32, route: &Route) -> Result<(), NetlinkError> {
        let action = || format!("add the route to {}/{}", route.destination, route.prefix);
        let message = RouteNetlinkMessage::NewRoute(route_message(table, interface, route));
        self.change(action, message, flags::CREATE | flags::REPLACE)
    }

    /// Removes a route of the main table.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_route(&mut self, interface: u32, route: &Route) -> Result<(), NetlinkError> {
        self.remove_route_from(RouteHeader::RT_TABLE_MAIN.into(), interface, route)
    }

    /// Removes a route of the table of this number.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_route_from(
        &mut self,
        table: u32,
        interface: u32,
        route: &Route,
    ) -> Result<(), NetlinkError> {
        let action = || format!("remove the route to {}/{}", route.destination, route.prefix);
        self.change(action, RouteNetlinkMessage::DelRoute(route_message(table, interface, route)), 0)
    }

    /// Sets the hardware address of a neighbour, for good.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add_neighbour(&mut self, interface: u32, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let action = || format!("add the neighbour {}", neighbour.address);
        let message = RouteNetlinkMessage::NewNeighbour(neighbour_message(interface, neighbour));
        self.change(action, message, flags::CREATE | flags::REPLACE)
    }

    /// Removes a neighbour.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove_neighbour(&mut self, interface: u32, neighbour: &Neighbour) -> Result<(), NetlinkError> {
        let action = || format!("remove the neighbour {}", neighbour.address);
        self.change(action, RouteNetlinkMessage::DelNeighbour(neighbour_message(interface, neighbour)), 0)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address_message(interface: u32, address: &InterfaceAddress) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.address);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = interface;
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.peer.unwrap_or(address.address)),
    ];
    let mut flags = AddressFlags::Permanent | AddressFlags::Noprefixroute;
    if address.address.is_ipv6() {
        flags |= AddressFlags::Nodad;
    }
    message.attributes.push(AddressAttribute::Flags(flags));
    message.attributes.extend(address.broadcast.map(AddressAttribute::Broadcast));
    message
}

fn route_message(table: u32, interface: u32, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination);
    header.destination_prefix_length = route.prefix;
    // The header has room for small numbers only.
    match u8::try_from(table) {
        Ok(small) => header.table = small,
        Err(_) => message.attributes.push(RouteAttribute::Table(table)),
    }
    header.protocol = route.protocol.into();
    header.scope = route.scope.into();
    header.kind = RouteType::Unicast;
    if route.onlink {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.prefix > 0 {
        attributes.push(RouteAttribute::Destination(RouteAddress::from(route.destination)));
    }
    attributes.extend(route.gateway.map(|gateway| {
        if gateway.is_ipv4() == route.destination.is_ipv4() {
            RouteAttribute::Gateway(RouteAddress::from(gateway))
        } else {
            RouteAttribute::Via(RouteVia::from(gateway))
        }
    }));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(RouteAddress::from(source))));
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    attributes.push(RouteAttribute::Oif(interface));
    message
}

fn neighbour_message(interface: u32, neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = interface;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match neighbour.address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        }),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.clone()),
    ];
    message
}
