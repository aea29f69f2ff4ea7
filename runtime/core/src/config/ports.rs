//! Ports of the host that lead to ports of a container, as the annotation `io.machinen.ports` and options name them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

/// Most published ports of a container.
pub const MAX_PUBLISHED: usize = 128;
/// How published ports are written.
pub const PORTS: &str = "[ADDRESS:]HOST:CONTAINER[/udp] with ports from 1 to 65535, such as 8080:80, 0.0.0.0:53:53/udp or [::1]:80:80";
/// The address of a port without one.
const DEFAULT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to a port of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// The protocol of both ports.
    pub protocol: Protocol,
    /// The address of the host. An unspecified one stands for all addresses of its kind.
    pub address: IpAddr,
    /// The port of the host, which is not 0.
    pub host: u16,
    /// The port of the container, which is not 0.
    pub container: u16,
}

/// A text is not that of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it takes {PORTS}")]
pub struct InvalidPort;

impl PublishedPort {
    /// Whether the host cannot have both ports.
    fn conflicts(&self, other: &Self) -> bool {
        let same_address = self.address == other.address
            || self.address.is_ipv4() == other.address.is_ipv4()
                && (self.address.is_unspecified() || other.address.is_unspecified());
        (self.protocol, self.host) == (other.protocol, other.host) && same_address
    }
}

/// Reads a list of ports, separated by commas.
///
/// # Errors
/// A port is malformed, conflicts with an earlier one, or there are more than [`MAX_PUBLISHED`].
pub fn parse_ports(text: &str) -> Result<Vec<PublishedPort>, InvalidPort> {
    let mut ports: Vec<PublishedPort> = Vec::new();
    for part in text.split(',') {
        let port: PublishedPort = part.trim().parse()?;
        if ports.len() == MAX_PUBLISHED || ports.iter().any(|other| other.conflicts(&port)) {
            return Err(InvalidPort);
        }
        ports.push(port);
    }
    Ok(ports)
}

impl FromStr for PublishedPort {
    type Err = InvalidPort;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (ends, protocol) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ends, "udp")) => (ends, Protocol::Udp),
            Some(_) => return Err(InvalidPort),
        };
        let (rest, container) = ends.rsplit_once(':').ok_or(InvalidPort)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (DEFAULT, rest),
            Some((address, host)) => (parse_address(address).ok_or(InvalidPort)?, host),
        };
        Ok(Self { protocol, address, host: parse_port(host)?, container: parse_port(container)? })
    }
}

fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(ipv6) => ipv6.parse().ok().map(IpAddr::V6),
        None => text.parse().ok().map(IpAddr::V4),
    }
}

fn parse_port(text: &str) -> Result<u16, InvalidPort> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0).ok_or(InvalidPort)
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        write!(f, "{}:{}", self.host, self.container)?;
        if self.protocol == Protocol::Udp { f.write_str("/udp") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        for (text, written) in [
            ("8080:80", "127.0.0.1:8080:80"),
            ("8080:80/tcp", "127.0.0.1:8080:80"),
            ("0.0.0.0:53:5353/udp", "0.0.0.0:53:5353/udp"),
            ("[::1]:1:65535", "[::1]:1:65535"),
        ] {
            assert_eq!(text.parse::<PublishedPort>().unwrap().to_string(), written);
            assert_eq!(written.parse::<PublishedPort>().unwrap().to_string(), written);
        }
        let list = parse_ports("80:80, 80:80/udp,10.0.0.1:80:81").unwrap();
        assert_eq!(list.len(), 3);
        assert_eq!((list[1].protocol, list[2].container), (Protocol::Udp, 81));
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in [
            "",
            "80",
            "80:",
            ":80",
            "0:80",
            "80:0",
            "65536:80",
            "+80:80",
            "80:80/sctp",
            "::1:80:80",
            "[1.2.3.4]:80:80",
            "localhost:80:80",
            "1:2:3:4",
            "80:80/tcp/tcp/x",
            "80:80,",
            "80:80,80:81",
            "80:80,0.0.0.0:80:81",
        ] {
            assert_eq!(parse_ports(text), Err(InvalidPort), "{text}");
        }
        let many = |count: usize| (1..=count).map(|port| format!("{port}:1")).collect::<Vec<_>>().join(",");
        assert_eq!(parse_ports(&many(MAX_PUBLISHED)).unwrap().len(), MAX_PUBLISHED);
        assert!(parse_ports(&many(MAX_PUBLISHED + 1)).is_err());
    }
}
