//! Connections and datagrams that processes of the host send to the localhost of a pod's network namespace, and that
//! lead to the guest's localhost.
//!
//! ```text
//!   report       agent ──raw stream──> host: the ports on which processes of the guest listen, after each change
//!   connection   process ──127.0.0.1 or ::1──> host ──raw stream of frames──> agent ──127.0.0.1 or ::1──> container
//! ```
//! A report is the number of ports (two bytes) and three bytes for each port: 4 or 6, for UDP with [`UDP`], and the port. A
//! frame is a length (two bytes) and that many bytes of the connection; one without bytes is the end of its direction. A
//! stream that ends without it is a reset. With UDP a stream belongs to one sender, and each frame is a datagram; empty ones
//! are not carried. Numbers are big-endian.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Most ports of a report. The agent reports no more, and the host accepts no more.
pub const MAX_PORTS: usize = 512;
/// Most connections of a pod at a time; others wait.
pub const MAX_CONNECTIONS: usize = 256;
/// Most bytes of a datagram (UDP over IPv4).
pub const MAX_DATAGRAM: usize = 65_507;
/// What marks a port of UDP in a report.
const UDP: u8 = 0x10;
/// Most bytes of a connection in one frame.
pub const MAX_FRAME: usize = 32 << 10;

/// A port of the guest's localhost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalPort {
    /// Of UDP, not of TCP.
    pub udp: bool,
    /// Of ::1, not of 127.0.0.1.
    pub ipv6: bool,
    /// The port, which is not 0.
    pub port: u16,
}

impl LocalPort {
    /// 127.0.0.1 or ::1.
    pub fn address(self) -> IpAddr {
        match self.ipv6 {
            true => Ipv6Addr::LOCALHOST.into(),
            false => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// A report is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidReport {
    /// It has too many ports.
    #[error("a report has {0} ports; there can be {MAX_PORTS}")]
    TooMany(u16),
    /// A port is 0, or of no known kind of address.
    #[error("a report has the port {1} of addresses of the kind {0}")]
    Port(u8, u16),
}

/// Bytes of a report's beginning.
pub const REPORT_HEADER: usize = 2;
/// Bytes of each port.
const PORT: usize = 3;

/// A report of the first [`MAX_PORTS`] ports.
pub fn encode_report(ports: &BTreeSet<LocalPort>) -> Vec<u8> {
    let ports: Vec<_> = ports.iter().take(MAX_PORTS).collect();
    let count = u16::try_from(ports.len()).expect("there are few");
    let mut report = count.to_be_bytes().to_vec();
    for port in ports {
        let [high, low] = port.port.to_be_bytes();
        let kind = if port.ipv6 { 6 } else { 4 };
        report.extend([if port.udp { kind | UDP } else { kind }, high, low]);
    }
    report
}

/// How many bytes follow the beginning of a report.
///
/// # Errors
/// The report has too many ports.
pub fn report_length(header: [u8; REPORT_HEADER]) -> Result<usize, InvalidReport> {
    match u16::from_be_bytes(header) {
        count if usize::from(count) <= MAX_PORTS => Ok(usize::from(count) * PORT),
        count => Err(InvalidReport::TooMany(count)),
    }
}

/// The ports of a report, without its beginning.
///
/// # Errors
/// A port is not valid.
pub fn decode_report(ports: &[u8]) -> Result<BTreeSet<LocalPort>, InvalidReport> {
    let decode = |&[kind, high, low]: &[u8; PORT]| {
        let port = u16::from_be_bytes([high, low]);
        match (kind & !UDP, port) {
            (version @ (4 | 6), 1..) => Ok(LocalPort { udp: kind & UDP != 0, ipv6: version == 6, port }),
            _ => Err(InvalidReport::Port(kind, port)),
        }
    };
    ports.as_chunks::<PORT>().0.iter().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_journey() {
        let ports = BTreeSet::from([
            LocalPort { udp: false, ipv6: false, port: 80 },
            LocalPort { udp: false, ipv6: true, port: 80 },
            LocalPort { udp: true, ipv6: false, port: 80 },
            LocalPort { udp: false, ipv6: false, port: 0xfffe },
        ]);
        let report = encode_report(&ports);
        assert_eq!(report, [0, 4, 4, 0, 80, 4, 0xff, 0xfe, 6, 0, 80, 0x14, 0, 80]);
        assert_eq!(report_length([report[0], report[1]]), Ok(report.len() - REPORT_HEADER));
        assert_eq!(decode_report(&report[REPORT_HEADER..]), Ok(ports));
        assert_eq!(encode_report(&BTreeSet::new()), [0, 0]);
    }

    #[test]
    fn reports_are_bounded_and_checked() {
        let all: BTreeSet<_> =
            (1..=u16::MAX).map(|port| LocalPort { udp: false, ipv6: false, port }).collect();
        let report = encode_report(&all);
        assert_eq!(report.len(), REPORT_HEADER + MAX_PORTS * PORT);
        assert_eq!(report_length([2, 1]), Err(InvalidReport::TooMany(513)));
        assert_eq!(decode_report(&[4, 0, 0]), Err(InvalidReport::Port(4, 0)));
        assert_eq!(decode_report(&[5, 0, 1]), Err(InvalidReport::Port(5, 1)));
    }
}
