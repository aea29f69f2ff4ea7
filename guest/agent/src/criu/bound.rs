//! Finds the sockets of a checkpoint that are bound to addresses which the container's network does not have.
//!
//! CRIU would fail for IPv4, without the address in its error. For IPv6 it would bind the socket all the same, and nothing
//! would ever arrive there.

use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use libc::{AF_INET, AF_INET6, IPPROTO_TCP};
use machinen_netlink::{NetlinkSocket, interfaces};
use protobuf::{
    CodedInputStream, Message as _, UnknownFields, UnknownValueRef, well_known_types::empty::Empty,
};

use super::{CriuError, files::FILES, image};

/// The field of an entry of [`FILES`] with a socket of IP, and fields of that (criu's images/sk-inet.proto).
const SOCKET: u32 = 4;
const FAMILY: u32 = 3;
const PROTOCOL: u32 = 5;
const STATE: u32 = 6;
const PORT: u32 = 7;
const ADDRESS: u32 = 11;
const OPTIONS: u32 = 16;
/// A field of [`OPTIONS`].
const FREEBIND: u32 = 1;

/// Values of [`STATE`]: the socket is no connection.
const CLOSE: u64 = 7;
const LISTEN: u64 = 10;

/// The most sockets that an error names.
const MAX_NAMED: usize = 4;

/// A socket that cannot be bound again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BoundSocket {
    address: SocketAddr,
    is_connection: bool,
}

/// Sockets that cannot be bound again, as an error names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UnboundSockets(Vec<BoundSocket>);

impl fmt::Display for UnboundSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, socket) in self.0.iter().take(MAX_NAMED).enumerate() {
            let separator = if number > 0 { ", " } else { "" };
            let kind = if socket.is_connection { "a connection from " } else { "" };
            write!(f, "{separator}{kind}{}", socket.address)?;
        }
        if self.0.len() > MAX_NAMED {
            write!(f, " and {} others", self.0.len() - MAX_NAMED)?;
        }
        f.write_str(
            ", and the container's network does not have the address: restore the container where it has, or bind the \
             program to 0.0.0.0 or :: before the checkpoint",
        )?;
        if self.0.iter().all(|socket| socket.is_connection) {
            f.write_str("; with io.machinen.tcp=close the connections are closed")?;
        }
        Ok(())
    }
}

/// Checks that each socket of the images can be bound to its address. `tcp_close`: connections are not restored.
///
/// # Errors
/// The container's network does not have an address, or the images cannot be read.
pub(super) fn check(images: &Path, tcp_close: bool) -> Result<(), CriuError> {
    let path = images.join(FILES);
    let list = fs::read(&path).and_then(|bytes| sockets(&bytes, tcp_close));
    let mut sockets = list.map_err(|source| CriuError::File { what: "read", path, source })?;
    sockets.retain(|socket| !is_always_there(socket.address.ip()));
    if sockets.is_empty() {
        return Ok(());
    }
    let own = own_addresses()?;
    sockets.retain(|socket| !own.contains(&socket.address.ip()));
    if sockets.is_empty() { Ok(()) } else { Err(CriuError::Unbound(UnboundSockets(sockets))) }
}

/// Whether a socket can be bound to the address in every network.
fn is_always_there(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast
}

/// The addresses of the VM's interfaces, and the broadcast addresses of their networks.
fn own_addresses() -> Result<Vec<IpAddr>, CriuError> {
    let mut kernel = NetlinkSocket::new().map_err(CriuError::Talk)?;
    let addresses = interfaces(&mut kernel)?.into_iter().flat_map(|interface| interface.addresses);
    Ok(addresses.flat_map(|own| [Some(own.address), own.broadcast.map(IpAddr::from)]).flatten().collect())
}

/// The sockets in the list of open files that must be bound to an address.
fn sockets(bytes: &[u8], tcp_close: bool) -> io::Result<Vec<BoundSocket>> {
    let (_, messages) = image::split(bytes)?;
    let mut sockets = Vec::new();
    for message in messages {
        let entry = Empty::parse_from_bytes(message)?;
        if let Some(UnknownValueRef::LengthDelimited(socket)) =
            entry.special_fields.unknown_fields().get(SOCKET)
        {
            let socket = Empty::parse_from_bytes(socket)?;
            sockets.extend(bound(socket.special_fields.unknown_fields(), tcp_close)?);
        }
    }
    Ok(sockets)
}

/// None: the socket is not bound, or may be bound to any address.
fn bound(socket: &UnknownFields, tcp_close: bool) -> io::Result<Option<BoundSocket>> {
    let number = |field| match socket.get(field) {
        Some(UnknownValueRef::Varint(value)) => value,
        _ => 0,
    };
    let is_tcp = number(PROTOCOL) == u64::from(IPPROTO_TCP.cast_unsigned());
    let is_connection = is_tcp && ![CLOSE, LISTEN].contains(&number(STATE));
    let port = u16::try_from(number(PORT)).unwrap_or(0);
    if port == 0 || has_freebind(socket)? || is_connection && tcp_close {
        return Ok(None);
    }
    let words = addresses(socket)?;
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    let family = i32::try_from(number(FAMILY)).unwrap_or(0);
    let address = match family {
        AF_INET => bytes.first_chunk::<4>().map(|octets| IpAddr::from(Ipv4Addr::from(*octets))),
        AF_INET6 => bytes.first_chunk::<16>().map(|octets| IpAddr::from(Ipv6Addr::from(*octets))),
        _ => None,
    };
    // A socket of IPv6 can have addresses of IPv4.
    let address = address.map(|address| SocketAddr::new(address.to_canonical(), port));
    Ok(address.map(|address| BoundSocket { address, is_connection }))
}

/// The words of the socket's own address, in the order of bytes of the network. They are fields, or one packed field.
fn addresses(socket: &UnknownFields) -> io::Result<Vec<u32>> {
    let mut words = Vec::new();
    for (field, value) in socket.iter() {
        match value {
            _ if field != ADDRESS => {}
            UnknownValueRef::Varint(word) => words.push(u32::try_from(word).map_err(io::Error::other)?),
            UnknownValueRef::Fixed32(word) => words.push(word),
            UnknownValueRef::LengthDelimited(packed) => {
                let mut packed = CodedInputStream::from_bytes(packed);
                while !packed.eof()? {
                    words.push(packed.read_raw_varint32()?);
                }
            }
            UnknownValueRef::Fixed64(_) => {}
        }
    }
    Ok(words)
}

fn has_freebind(socket: &UnknownFields) -> io::Result<bool> {
    let Some(UnknownValueRef::LengthDelimited(options)) = socket.get(OPTIONS) else { return Ok(false) };
    let options = Empty::parse_from_bytes(options)?;
    Ok(options.special_fields.unknown_fields().get(FREEBIND) == Some(UnknownValueRef::Varint(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: u64 = 1;
    const UDP: u64 = 17;
    const TCP: u64 = 6;

    fn entry(family: i32, protocol: u64, state: u64, address: IpAddr, options: &[u8]) -> Vec<u8> {
        let (mut entry, mut socket) = (Empty::new(), Empty::new());
        let fields = socket.special_fields.mut_unknown_fields();
        let family = u64::try_from(family).unwrap();
        for (field, value) in [(FAMILY, family), (PROTOCOL, protocol), (STATE, state), (PORT, 80)] {
            fields.add_varint(field, value);
        }
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        for word in octets.as_chunks::<4>().0 {
            fields.add_varint(ADDRESS, u32::from_ne_bytes(*word).into());
        }
        fields.add_length_delimited(OPTIONS, options.to_vec());
        entry
            .special_fields
            .mut_unknown_fields()
            .add_length_delimited(SOCKET, socket.write_to_bytes().unwrap());
        entry.write_to_bytes().unwrap()
    }

    fn list(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut list = b"magic888".to_vec();
        entries.iter().for_each(|entry| image::append(&mut list, entry).unwrap());
        list
    }

    #[test]
    fn addresses_that_the_network_lacks_are_named() {
        // Of the networks for documentation (RFC 5737, RFC 3849), so that no interface of this machine has them.
        let (four, six): (IpAddr, IpAddr) = ("192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap());
        let any: IpAddr = Ipv4Addr::UNSPECIFIED.into();
        let dir = tempfile::tempdir().unwrap();
        let found = |entries: &[Vec<u8>], tcp_close| {
            fs::write(dir.path().join(FILES), list(entries)).unwrap();
            match check(dir.path(), tcp_close) {
                Ok(()) => String::new(),
                Err(CriuError::Unbound(sockets)) => sockets.to_string(),
                Err(error) => panic!("{error}"),
            }
        };
        let listening = entry(AF_INET, TCP, LISTEN, four, &[]);
        let connection = entry(AF_INET6, TCP, ESTABLISHED, six, &[]);
        assert!(found(std::slice::from_ref(&listening), false).starts_with("192.0.2.9:80, and the"));
        let both = found(&[listening, connection.clone()], false);
        assert!(both.starts_with("192.0.2.9:80, a connection from [2001:db8::9]:80, and"), "{both}");
        assert!(!both.contains("tcp=close"), "{both}");
        assert!(found(std::slice::from_ref(&connection), false).contains("io.machinen.tcp=close"));
        assert_eq!(found(&[connection], true), "");
        assert_ne!(found(&[entry(AF_INET, UDP, ESTABLISHED, four, &[])], true), "");
        // Such a socket may have any address.
        assert_eq!(found(&[entry(AF_INET, UDP, CLOSE, four, b"\x08\x01")], false), "");
        for there in [any, Ipv4Addr::LOCALHOST.into(), Ipv4Addr::BROADCAST.into()] {
            assert_eq!(found(&[entry(AF_INET, TCP, LISTEN, there, &[])], false), "");
        }
        assert_eq!(found(&[b"\x08\x01\x10\x07".to_vec()], false), "");
    }
}
