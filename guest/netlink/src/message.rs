//! Interfaces in the messages between the host and the agent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use machinen_protocol::api;

use crate::{Interface, InterfaceAddress, Neighbour, Route};

/// Longest name of a network interface, bytes (IFNAMSIZ without the final zero).
const MAX_NAME: usize = 15;

/// An interface in a message that cannot exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidInterface {
    /// The kernel allows no such name.
    #[error("{0:?} cannot be the name of a network interface")]
    Name(String),
    /// The hardware address has not six bytes.
    #[error("a hardware address has {0} bytes instead of 6")]
    Mac(usize),
    /// An address has neither four nor sixteen bytes.
    #[error("a network address has {0} bytes instead of 4 or 16")]
    Address(usize),
    /// A prefix, scope or origin is too large a number.
    #[error("{0} is too large a number for a prefix, a scope or the origin of a route")]
    Number(u32),
}

/// The message about an interface, which the VM has as the network device with the number `device`.
pub fn to_message(device: u32, interface: &Interface) -> api::NetworkInterface {
    let bytes = |address: Option<IpAddr>| address.map(octets).unwrap_or_default();
    let addresses = interface.addresses.iter().map(|address| api::InterfaceAddress {
        address: octets(address.address),
        prefix: address.prefix.into(),
        broadcast: bytes(address.broadcast.map(IpAddr::from)),
        peer: bytes(address.peer),
        scope: address.scope.into(),
        ..Default::default()
    });
    let routes = interface.routes.iter().map(|route| api::Route {
        destination: octets(route.destination),
        prefix: route.prefix.into(),
        gateway: bytes(route.gateway),
        onlink: route.onlink,
        source: bytes(route.source),
        metric: route.metric,
        scope: route.scope.into(),
        protocol: route.protocol.into(),
        ..Default::default()
    });
    let neighbours = interface.neighbours.iter().map(|neighbour| api::Neighbour {
        address: octets(neighbour.address),
        mac: neighbour.mac.clone(),
        ..Default::default()
    });
    api::NetworkInterface {
        device,
        name: interface.name.clone(),
        mac: interface.mac.clone(),
        mtu: interface.mtu,
        addresses: addresses.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        ..Default::default()
    }
}

/// The interface of a message.
///
/// # Errors
/// A value is not one that an interface can have.
pub fn from_message(message: &api::NetworkInterface) -> Result<Interface, InvalidInterface> {
    let name = &message.name;
    let is_valid = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(is_valid) {
        return Err(InvalidInterface::Name(name.chars().take(64).collect()));
    }
    let addresses = message.addresses.iter().map(|address| {
        Ok(InterfaceAddress {
            address: required(&address.address)?,
            prefix: small(address.prefix)?,
            broadcast: match optional(&address.broadcast)? {
                Some(IpAddr::V4(address)) => Some(address),
                Some(IpAddr::V6(_)) => return Err(InvalidInterface::Address(16)),
                None => None,
            },
            peer: optional(&address.peer)?,
            scope: small(address.scope)?,
        })
    });
    let routes = message.routes.iter().map(|route| {
        Ok(Route {
            destination: required(&route.destination)?,
            prefix: small(route.prefix)?,
            gateway: optional(&route.gateway)?,
            onlink: route.onlink,
            source: optional(&route.source)?,
            metric: route.metric,
            scope: small(route.scope)?,
            protocol: small(route.protocol)?,
        })
    });
    let neighbours = message.neighbours.iter().map(|neighbour| {
        Ok(Neighbour { address: required(&neighbour.address)?, mac: hardware_address(&neighbour.mac)? })
    });
    Ok(Interface {
        name: name.clone(),
        mac: hardware_address(&message.mac)?,
        mtu: message.mtu,
        addresses: addresses.collect::<Result<_, _>>()?,
        routes: routes.collect::<Result<_, _>>()?,
        neighbours: neighbours.collect::<Result<_, _>>()?,
        ..Interface::default()
    })
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn required(bytes: &[u8]) -> Result<IpAddr, InvalidInterface> {
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(octets).into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(octets) => Ok(Ipv6Addr::from(octets).into()),
        Err(_) => Err(InvalidInterface::Address(bytes.len())),
    }
}

fn optional(bytes: &[u8]) -> Result<Option<IpAddr>, InvalidInterface> {
    if bytes.is_empty() { Ok(None) } else { required(bytes).map(Some) }
}

fn hardware_address(bytes: &[u8]) -> Result<Vec<u8>, InvalidInterface> {
    if bytes.len() == 6 { Ok(bytes.to_vec()) } else { Err(InvalidInterface::Mac(bytes.len())) }
}

fn small(number: u32) -> Result<u8, InvalidInterface> {
    u8::try_from(number).map_err(|_| InvalidInterface::Number(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        let [own, gateway, other] = ["10.0.0.2", "10.0.0.1", "fd00::1"].map(|text| text.parse().unwrap());
        Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 9],
            mtu: 1450,
            addresses: vec![
                InterfaceAddress {
                    address: own,
                    prefix: 24,
                    broadcast: Some(Ipv4Addr::new(10, 0, 0, 255)),
                    peer: Some(gateway),
                    scope: 0,
                },
                InterfaceAddress { address: other, prefix: 64, broadcast: None, peer: None, scope: 253 },
            ],
            routes: vec![Route {
                destination: Ipv4Addr::UNSPECIFIED.into(),
                prefix: 0,
                gateway: Some(other),
                onlink: true,
                source: Some(own),
                metric: 5,
                scope: 0,
                protocol: 4,
            }],
            neighbours: vec![Neighbour { address: gateway, mac: vec![2, 0, 0, 0, 0, 8] }],
            ..Interface::default()
        }
    }

    #[test]
    fn an_interface_arrives_as_it_was_sent() {
        assert_eq!(from_message(&to_message(0, &interface())).unwrap(), interface());
    }

    #[test]
    fn what_cannot_exist_is_refused() {
        let refused = |change: fn(&mut api::NetworkInterface)| {
            let mut message = to_message(0, &interface());
            change(&mut message);
            from_message(&message).unwrap_err()
        };
        for name in ["", "a/b", "..", "eth0:1", "sixteen-bytes-16", "a b"] {
            let mut message = to_message(0, &interface());
            name.clone_into(&mut message.name);
            assert_eq!(from_message(&message), Err(InvalidInterface::Name(name.to_owned())));
        }
        assert_eq!(refused(|message| message.mac.clear()), InvalidInterface::Mac(0));
        assert_eq!(refused(|message| message.routes[0].gateway.truncate(3)), InvalidInterface::Address(3));
        assert_eq!(refused(|message| message.addresses[0].address.clear()), InvalidInterface::Address(0));
        assert_eq!(
            refused(|message| message.addresses[0].broadcast = vec![0; 16]),
            InvalidInterface::Address(16)
        );
        assert_eq!(refused(|message| message.addresses[1].prefix = 256), InvalidInterface::Number(256));
    }
}
