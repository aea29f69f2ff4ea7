//! Which sockets listen on localhost, by TCP and UDP, as ss(8) shows them (sock_diag(7)).

use std::{io, net::Ipv6Addr};

use machinen_protocol::localhost::LocalPort;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use crate::NetlinkError;

/// The bytes of a message's header (netlink(7)).
const HEADER: usize = 16;
/// The type of requests and answers about sockets of one family (sock_diag(7)).
const BY_FAMILY: u16 = 20;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// NLM_F_REQUEST and NLM_F_DUMP.
const LIST: u16 = 0x301;
/// The number of a protocol above IP, and the state of its sockets that listen, as a bit: TCP_LISTEN, and TCP_CLOSE for a
/// socket of UDP that receives from anyone.
const PROTOCOLS: [(u8, u32); 2] = [(TCP, 1 << 10), (UDP, 1 << 7)];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// inet_diag.h: INET_DIAG_SKV6ONLY.
const ONLY_IPV6: u16 = 11;
/// Bytes of `inet_diag_msg`, and where its fields are.
const MESSAGE: usize = 72;
const SOURCE_PORT: usize = 4;
const SOURCE: usize = 8;
const INTERFACE: usize = 40;
/// The kernel gives the loopback interface of each namespace this number.
const LOOPBACK: u32 = 1;

/// The ports of 127.0.0.1 and ::1 on which a process of this thread's namespace listens, one of them twice if several
/// sockets have it.
///
/// # Errors
/// The kernel refuses, or cannot list sockets.
pub fn listening_on_localhost() -> Result<Vec<LocalPort>, NetlinkError> {
    let mut found = Vec::new();
    for protocol in PROTOCOLS {
        for family in [libc_family::INET, libc_family::INET6] {
            list(family, protocol, |socket| found.extend(socket.ports(protocol.0 == UDP)))?;
        }
    }
    Ok(found)
}

/// Numbers of address families (socket(2)).
mod libc_family {
    pub(super) const INET: u8 = 2;
    pub(super) const INET6: u8 = 10;
}

/// A socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listening {
    family: u8,
    port: u16,
    address: [u8; 16],
    interface: u32,
    only_ipv6: bool,
}

impl Listening {
    /// Reads `inet_diag_msg` and its attributes.
    fn parse(message: &[u8]) -> Option<Self> {
        let (fixed, mut rest) = message.split_at_checked(MESSAGE)?;
        let port = u16::from_be_bytes([fixed[SOURCE_PORT], fixed[SOURCE_PORT + 1]]);
        let address = *fixed[SOURCE..].first_chunk()?;
        let interface = u32::from_ne_bytes(*fixed[INTERFACE..].first_chunk()?);
        let mut only_ipv6 = false;
        while let Some(&[a, b, c, d]) = rest.first_chunk() {
            let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
            only_ipv6 |= kind == ONLY_IPV6 && rest.get(4).is_some_and(|&value| value != 0);
            rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
        }
        Some(Self { family: fixed[0], port, address, interface, only_ipv6 })
    }

    /// The ports of localhost that lead to the socket.
    fn ports(self, udp: bool) -> impl Iterator<Item = LocalPort> {
        let Self { family, port, address, interface, only_ipv6 } = self;
        let (ipv4, ipv6) = match family {
            libc_family::INET => {
                ([[0; 4], [127, 0, 0, 1]].contains(&[address[0], address[1], address[2], address[3]]), false)
            }
            libc_family::INET6 => {
                let address = Ipv6Addr::from(address);
                let mapped = address.to_ipv4_mapped().is_some_and(|ipv4| ipv4.octets() == [127, 0, 0, 1]);
                (
                    mapped || address.is_unspecified() && !only_ipv6,
                    address.is_unspecified() || address.is_loopback(),
                )
            }
            _ => (false, false),
        };
        let reachable = port != 0 && [0, LOOPBACK].contains(&interface);
        let port = move |ipv6| LocalPort { udp, ipv6, port };
        [(ipv4, port(false)), (ipv6, port(true))]
            .into_iter()
            .filter_map(move |(is, port)| (is && reachable).then_some(port))
    }
}

/// Lists the sockets of one family and protocol that listen.
fn list(
    family: u8,
    (protocol, listens): (u8, u32),
    mut each: impl FnMut(Listening),
) -> Result<(), NetlinkError> {
    let broken = |action| move |source| NetlinkError::Socket { action, source };
    let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(broken("make"))?;
    socket.bind_auto().map_err(broken("make"))?;
    // inet_diag_req_v2: the identity of a socket, which a list does not name, is the rest.
    let mut request = vec![0_u8; HEADER + 56];
    let length = u32::try_from(request.len()).expect("it is short");
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&LIST.to_ne_bytes());
    request[HEADER..HEADER + 2].copy_from_slice(&[family, protocol]);
    request[HEADER + 4..HEADER + 8].copy_from_slice(&listens.to_ne_bytes());
    socket.send_to(&request, &SocketAddr::new(0, 0), 0).map_err(broken("send to"))?;
    loop {
        let (bytes, _) = socket.recv_from_full().map_err(broken("receive from"))?;
        let mut rest = &bytes[..];
        while let Some(header) = rest.first_chunk::<HEADER>() {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let body = rest.get(HEADER..length).unwrap_or_default();
            match u16::from_ne_bytes([header[4], header[5]]) {
                BY_FAMILY => Listening::parse(body).into_iter().for_each(&mut each),
                DONE => return Ok(()),
                ERROR => {
                    let number = body.first_chunk().map_or(0, |&number| i32::from_ne_bytes(number));
                    let action = "list the sockets that listen".to_owned();
                    return Err(NetlinkError::Refused {
                        action,
                        source: io::Error::from_raw_os_error(-number),
                    });
                }
                _ => {}
            }
            rest = rest.get(length.max(HEADER).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn sockets_of_both_kinds_are_found() {
        let listening = |port| {
            let found = listening_on_localhost().unwrap();
            let kinds = |ipv6| found.contains(&LocalPort { udp: false, ipv6, port });
            (kinds(false), kinds(true))
        };
        for (address, wanted) in [
            ("127.0.0.1:0", (true, false)),
            ("0.0.0.0:0", (true, false)),
            ("127.0.0.2:0", (false, false)),
            ("[::1]:0", (false, true)),
            ("[::]:0", (true, true)),
        ] {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert_eq!(listening(port), wanted, "{address}");
            drop(listener);
            assert_eq!(listening(port), (false, false), "{address}");
        }
    }

    #[test]
    fn sockets_of_udp_that_receive_from_anyone_are_found() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = LocalPort { udp: true, ipv6: false, port: socket.local_addr().unwrap().port() };
        assert!(listening_on_localhost().unwrap().contains(&port));
        socket.connect("127.0.0.1:9").unwrap();
        assert!(!listening_on_localhost().unwrap().contains(&port));
    }

    #[test]
    fn a_socket_of_ipv6_only_and_one_of_another_interface() {
        let socket = Listening { family: 10, port: 80, address: [0; 16], interface: 0, only_ipv6: true };
        let found: Vec<_> = socket.ports(false).collect();
        assert_eq!(found, [LocalPort { udp: false, ipv6: true, port: 80 }]);
        assert_eq!(Listening { interface: 7, ..socket }.ports(false).count(), 0);
        let mapped = Ipv6Addr::from([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1]).octets();
        let mapped = Listening { address: mapped, ..socket };
        let found: Vec<_> = mapped.ports(true).collect();
        assert_eq!(found, [LocalPort { udp: true, ipv6: false, port: 80 }]);
        let mut message = vec![0; MESSAGE];
        message[0] = 10;
        message[5] = 80;
        message.extend([5, 0, 11, 0, 1, 0, 0, 0]);
        assert_eq!(Listening::parse(&message), Some(socket));
        assert_eq!(Listening::parse(&message[..MESSAGE - 1]), None);
    }
}
