//! The host's side with real namespaces: a second tap device is the container's interface, so that the test sees what
//! leaves through it, and sends what arrives there.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
};

use machinen_base::{netns, sys::tap};
use machinen_netlink::{InterfaceAddress, IpVersion, Neighbour, NetlinkSocket, Route, interfaces, packet};
use machinen_vm::tap_name;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{NetworkError, PacketPath, egress::Egress, namespace::PodNamespace, routed::remove_rules};

const OWN: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);

/// virtio's header of a packet without offloads.
const HEADER: [u8; 10] = [0; 10];

struct Lab {
    namespace: OwnedFd,
    socket: NetlinkSocket,
    /// The other end of the container's interface.
    outside: File,
    vm_namespace: OwnedFd,
    /// QEMU's descriptor.
    vm: File,
    _vm_second: OwnedFd,
}

/// A namespace with the tap devices of a VM that has two.
fn taps() -> (OwnedFd, [OwnedFd; 2]) {
    netns::inside_new(|| Ok([tap::create(&tap_name(0))?, tap::create(&tap_name(1))?])).unwrap()
}

impl Lab {
    fn new() -> Self {
        let make = || Ok((tap::create("eth0")?, NetlinkSocket::new()?));
        let (namespace, (outside, mut socket)) = netns::inside_new(make).unwrap();
        let (vm_namespace, [vm, _vm_second]) = taps();
        let index = index(&mut socket, "eth0");
        for (address, prefix) in [(IpAddr::from(OWN), 24), (OWN6.into(), 64)] {
            let address = InterfaceAddress { address, prefix, broadcast: None, peer: None, scope: 0 };
            socket.add_address(index, &address).unwrap();
        }
        socket.set_link(index, "eth0", true, Vec::new()).unwrap();
        Self { namespace, socket, outside: outside.into(), vm_namespace, vm: vm.into(), _vm_second }
    }

    fn connect(&self) -> PodNamespace {
        self.connect_by(PacketPath::Redirected)
    }

    fn connect_by(&self, path: PacketPath) -> PodNamespace {
        let namespace = self.namespace.try_clone().unwrap();
        let tap = self.vm_namespace.try_clone().unwrap();
        let mut pod = PodNamespace::connect(namespace, Some((tap, 2)), path).unwrap().unwrap().0;
        pod.set_egress(Egress::Open).unwrap();
        pod
    }

    fn filters(&mut self, interface: &str) -> usize {
        self.filters_at(interface, packet::tc::TcHandle::MIN_INGRESS)
    }

    fn filters_at(&mut self, interface: &str, side: u16) -> usize {
        let index = index(&mut self.socket, interface);
        let mut message = packet::tc::TcMessage::with_index(index.cast_signed());
        message.header.parent = packet::tc::TcHandle { major: u16::MAX, minor: side };
        let get = packet::RouteNetlinkMessage::GetTrafficFilter(message);
        // Without a queueing discipline the kernel sends an empty list.
        self.socket.list(|| "list the filters".to_owned(), get).unwrap().len()
    }
}

fn index(socket: &mut NetlinkSocket, name: &str) -> u32 {
    let found = interfaces(socket).unwrap().into_iter().find(|interface| interface.name == name);
    found.unwrap_or_else(|| panic!("no {name}")).index
}

fn mac(socket: &mut NetlinkSocket) -> [u8; 6] {
    let found = interfaces(socket).unwrap().into_iter().find(|interface| interface.name == "eth0").unwrap();
    found.mac.try_into().unwrap()
}

/// A packet of Ethernet whose body ends with a mark.
fn frame(source: [u8; 6], protocol: u16, head: &[u8], mark: u8) -> Vec<u8> {
    let mut frame = [HEADER.as_slice(), &[0xff; 6], &source, &protocol.to_be_bytes(), head].concat();
    frame.extend([mark; 64]);
    frame
}

fn ipv4(source: Ipv4Addr) -> Vec<u8> {
    let mut head = vec![0x45, 0, 0, 84, 0, 0, 0, 0, 64, 253, 0, 0];
    head.extend(source.octets());
    head.extend([10, 77, 0, 1]);
    head
}

fn ipv6(source: Ipv6Addr) -> Vec<u8> {
    let mut head = vec![0x60, 0, 0, 0, 0, 64, 253, 64];
    head.extend(source.octets());
    head.extend([0xff; 16]);
    head
}

fn arp(mac: [u8; 6], source: Ipv4Addr) -> Vec<u8> {
    let mut head = vec![0, 1, 8, 0, 6, 4, 0, 1];
    head.extend(mac);
    head.extend(source.octets());
    head.extend([0; 10]);
    head
}

/// The mark of the next packet that this test has sent.
fn next_mark(device: &mut File, marks: &[u8]) -> u8 {
    loop {
        let mut fds = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000_u16)).unwrap(), 1, "no packet arrives");
        let mut packet = [0; 2048];
        let length = device.read(&mut packet).unwrap();
        let last = packet[length - 1];
        // The kernel's own packets have other ends.
        if marks.contains(&last) && packet[..length].ends_with(&[last; 64]) {
            return last;
        }
    }
}

#[test]
fn packets_pass_both_ways_and_nothing_stays() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    let connected = pod.refresh().unwrap();
    let [(0, interface)] = &connected[..] else { panic!("{connected:?}") };
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1500));
    let own: Vec<_> = interface.addresses.iter().map(|address| address.address).collect();
    assert!(own.contains(&OWN.into()) && own.contains(&OWN6.into()), "{own:?}");
    let mac = mac(&mut lab.socket);
    lab.vm.write_all(&frame(mac, 0x0800, &ipv4(OWN), b'1')).unwrap();
    assert_eq!(next_mark(&mut lab.outside, b"1"), b'1');
    lab.outside
        .write_all(&frame([2, 0, 0, 0, 0, 1], 0x0800, &ipv4(Ipv4Addr::new(10, 77, 0, 1)), b'2'))
        .unwrap();
    assert_eq!(next_mark(&mut lab.vm, b"2"), b'2');
    // A second look changes nothing.
    assert_eq!(pod.refresh().unwrap(), connected);
    assert!(lab.filters("eth0") > 0);
    pod.disconnect().unwrap();
    assert_eq!((lab.filters("eth0"), lab.filters("machinen0")), (0, 0));
    pod.disconnect().unwrap();
}

#[test]
fn a_guest_sends_from_its_own_addresses_only() {
    let mut lab = Lab::new();
    assert_eq!(lab.connect().refresh().unwrap().len(), 1);
    let own = mac(&mut lab.socket);
    let other = [2, 0, 0, 0, 0, 9];
    let (stranger, stranger6) = (Ipv4Addr::new(10, 77, 0, 3), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 3));
    for (forged, honest) in [
        (frame(other, 0x0800, &ipv4(OWN), b'f'), frame(own, 0x0800, &ipv4(OWN), b'h')),
        (frame(own, 0x0800, &ipv4(stranger), b'f'), frame(own, 0x0800, &ipv4(OWN), b'h')),
        (frame(own, 0x86dd, &ipv6(stranger6), b'f'), frame(own, 0x86dd, &ipv6(OWN6), b'h')),
        (frame(own, 0x0806, &arp(own, stranger), b'f'), frame(own, 0x0806, &arp(own, OWN), b'h')),
        (frame(own, 0x0806, &arp(other, OWN), b'f'), frame(own, 0x0806, &arp(own, OWN), b'h')),
        (frame(own, 0x88cc, &[], b'f'), frame(own, 0x0806, &arp(own, OWN), b'h')),
    ] {
        lab.vm.write_all(&forged).unwrap();
        lab.vm.write_all(&honest).unwrap();
        assert_eq!(next_mark(&mut lab.outside, b"fh"), b'h', "{forged:?}");
    }
}

#[test]
fn a_namespace_has_one_vm_and_each_interface_a_device() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    let names = |pod: &mut PodNamespace| -> Vec<(u32, String)> {
        let connected = pod.refresh().unwrap();
        connected.into_iter().map(|(device, interface)| (device, interface.name)).collect()
    };
    let wanted = |pairs: &[(u32, &str)]| -> Vec<(u32, String)> {
        pairs.iter().map(|&(device, name)| (device, name.to_owned())).collect()
    };
    assert_eq!(names(&mut pod), wanted(&[(0, "eth0")]));
    let connect = |taps| {
        PodNamespace::connect(lab.namespace.try_clone().unwrap(), taps, PacketPath::Redirected)
            .unwrap()
            .unwrap()
            .0
    };
    assert!(matches!(connect(Some((taps().0, 2))).refresh(), Err(NetworkError::InUse)));
    assert!(matches!(connect(None).refresh(), Err(NetworkError::NoDevice)));
    let add = |name| netns::inside(lab.namespace.as_fd(), || tap::create(name)).unwrap();
    let (second, third) = (add("eth1"), add("eth2"));
    // An interface that is switched off does not count.
    assert_eq!(names(&mut pod), wanted(&[(0, "eth0")]));
    let numbers = ["eth0", "eth1", "eth2"].map(|name| index(&mut lab.socket, name));
    lab.socket.set_link(numbers[1], "eth1", true, Vec::new()).unwrap();
    assert_eq!(names(&mut pod), wanted(&[(0, "eth0"), (1, "eth1")]));
    lab.socket.set_link(numbers[2], "eth2", true, Vec::new()).unwrap();
    let refused = pod.refresh().unwrap_err().to_string();
    assert_eq!(
        refused,
        "the network namespace has 3 interfaces (eth0, eth1, eth2), and the VM has 2 (vm.network_devices)"
    );
    // A device that is free again is used for another interface, and the others keep theirs.
    lab.socket.set_link(numbers[0], "eth0", false, Vec::new()).unwrap();
    assert_eq!(names(&mut pod), wanted(&[(0, "eth2"), (1, "eth1")]));
    assert_eq!(lab.filters("eth0"), 0);
    drop((second, third));
    assert_eq!(names(&mut pod), wanted(&[]));
    // The namespace of this process is the host's.
    let own = netns::open(std::path::Path::new("/proc/self/ns/net")).unwrap();
    assert!(PodNamespace::connect(own, None, PacketPath::Redirected).unwrap().is_none());
}

#[test]
fn the_tap_device_comes_with_the_first_interface() {
    let mut lab = Lab::new();
    let number = index(&mut lab.socket, "eth0");
    lab.socket.set_link(number, "eth0", false, Vec::new()).unwrap();
    let mut pod = lab.connect();
    assert!(pod.refresh().unwrap().is_empty());
    let names = |socket: &mut NetlinkSocket| -> Vec<_> {
        interfaces(socket).unwrap().into_iter().map(|interface| interface.name).collect()
    };
    assert!(!names(&mut lab.socket).contains(&"machinen0".to_owned()));
    lab.socket.set_link(number, "eth0", true, Vec::new()).unwrap();
    assert_eq!(pod.refresh().unwrap().len(), 1);
    assert!(names(&mut lab.socket).contains(&"machinen0".to_owned()));
}

#[test]
fn nothing_leaves_while_the_connections_belong_to_a_checkpoint() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    assert_eq!(pod.refresh().unwrap().len(), 1);
    let own = mac(&mut lab.socket);
    for closed in [Egress::Held, Egress::Closed] {
        pod.set_egress(closed).unwrap();
        lab.vm.write_all(&frame(own, 0x0800, &ipv4(OWN), b'c')).unwrap();
        pod.set_egress(Egress::Open).unwrap();
        lab.vm.write_all(&frame(own, 0x0800, &ipv4(OWN), b'o')).unwrap();
        assert_eq!(next_mark(&mut lab.outside, b"co"), b'o', "{closed:?}");
    }
    // What arrives is redirected in any case.
    pod.set_egress(Egress::Held).unwrap();
    let from_peer = frame([2, 0, 0, 0, 0, 1], 0x0800, &ipv4(Ipv4Addr::new(10, 77, 0, 1)), b'2');
    lab.outside.write_all(&from_peer).unwrap();
    assert_eq!(next_mark(&mut lab.vm, b"2"), b'2');
    let counted = pod.counters().unwrap();
    let [(name, counters)] = &counted[..] else { panic!("{counted:?}") };
    assert_eq!(name, "eth0");
    assert!(counters.received.packets >= 1 && counters.sent.packets >= 4, "{counters:?}");
}

#[test]
fn the_hosts_kernel_resets_no_connection_of_a_checkpoint() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    assert_eq!(pod.refresh().unwrap().len(), 1);
    pod.set_egress(Egress::Held).unwrap();
    pod.disconnect().unwrap();
    let resets = |lab: &mut Lab| lab.filters_at("eth0", packet::tc::TcHandle::MIN_EGRESS);
    assert_ne!(resets(&mut lab), 0);
    assert_eq!(lab.filters("eth0"), 0);
    // The next container has the connections.
    let (other, _taps) = taps();
    lab.socket.move_to("machinen0", other.as_fd(), "old").unwrap();
    lab.vm_namespace = other;
    let mut pod = lab.connect();
    assert_eq!(pod.refresh().unwrap().len(), 1);
    assert_eq!(resets(&mut lab), 0);
}

/// A packet of UDP whose data is a mark, from the guest's neighbour or to it.
fn datagram(ends: [Ipv4Addr; 2], port: u16) -> Vec<u8> {
    let mut head = vec![0x45, 0, 0, 92, 0, 0, 0, 0, 64, 17, 0, 0];
    head.extend(ends.iter().flat_map(Ipv4Addr::octets));
    let words = head.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    // Without a checksum of the datagram.
    head.extend([7, 8].into_iter().chain(port.to_be_bytes()).chain([0, 72, 0, 0]));
    head
}

fn datagram6(ends: [Ipv6Addr; 2]) -> Vec<u8> {
    let mut head = vec![0x60, 0, 0, 0, 0, 64, 253, 64];
    head.extend(ends.iter().flat_map(Ipv6Addr::octets));
    head
}

/// A lab whose namespace routes packets to the guest, and what the guest sends to.
struct RoutedLab {
    lab: Lab,
    pod: PodNamespace,
    own: [u8; 6],
    gateway: [u8; 6],
}

const PEER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

impl RoutedLab {
    fn new() -> Self {
        let mut lab = Lab::new();
        let index = index(&mut lab.socket, "eth0");
        for (address, network, prefix) in [
            (PEER.into(), [10, 77, 0, 0].into(), 24),
            (PEER6.into(), IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, 0]), 64),
        ] {
            let neighbour = Neighbour { address, mac: PEER_MAC.to_vec() };
            lab.socket.add_neighbour(index, &neighbour).unwrap();
            let route = Route {
                destination: network,
                prefix,
                gateway: None,
                onlink: false,
                source: None,
                metric: 0,
                scope: if network.is_ipv4() { 253 } else { 0 },
                protocol: 4,
            };
            lab.socket.add_route(index, &route).unwrap();
        }
        // As many distributions have it.
        let strict = || std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1");
        netns::inside(lab.namespace.as_fd(), strict).unwrap();
        let mut pod = lab.connect_by(PacketPath::Routed);
        let connected = pod.refresh().unwrap();
        let [(0, interface)] = &connected[..] else { panic!("{connected:?}") };
        let own = mac(&mut lab.socket);
        assert_eq!((interface.name.as_str(), &interface.mac[..]), ("eth0", &own[..]));
        let found: Vec<_> = interface.addresses.iter().map(|found| (found.address, found.prefix)).collect();
        assert_eq!(found, [(OWN.into(), 32), (OWN6.into(), 128)]);
        let gateway: [u8; 6] = interface.neighbours[0].mac.clone().try_into().unwrap();
        Self { lab, pod, own, gateway }
    }

    /// The mark of the next packet that leaves after the guest has sent these.
    fn leaves(&mut self, packets: &[Vec<u8>], marks: &[u8]) -> u8 {
        for packet in packets {
            self.lab.vm.write_all(packet).unwrap();
        }
        next_mark(&mut self.lab.outside, marks)
    }

    fn sent(&self, source: [u8; 6], protocol: u16, head: &[u8], mark: u8) -> Vec<u8> {
        to(self.gateway, frame(source, protocol, head, mark))
    }

    fn arriving(&self, protocol: u16, head: &[u8], mark: u8) -> Vec<u8> {
        to(self.own, frame(PEER_MAC, protocol, head, mark))
    }
}

fn to(mac: [u8; 6], mut frame: Vec<u8>) -> Vec<u8> {
    frame[HEADER.len()..][..6].copy_from_slice(&mac);
    frame
}

#[test]
fn routed_packets_pass_both_ways_from_the_guests_own_addresses() {
    let mut routed = RoutedLab::new();
    let (own, other) = (routed.own, [2, 0, 0, 0, 0, 9]);
    let (stranger, stranger6) = (Ipv4Addr::new(10, 77, 0, 3), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 3));
    let honest = routed.sent(own, 0x0800, &datagram([OWN, PEER], 9), b'h');
    let honest6 = routed.sent(own, 0x86dd, &datagram6([OWN6, PEER6]), b'6');
    for forged in [
        routed.sent(other, 0x0800, &datagram([OWN, PEER], 9), b'f'),
        routed.sent(own, 0x0800, &datagram([stranger, PEER], 9), b'f'),
        routed.sent(own, 0x86dd, &datagram6([stranger6, PEER6]), b'f'),
    ] {
        assert_eq!(routed.leaves(&[forged.clone(), honest.clone()], b"hf6"), b'h', "{forged:?}");
        assert_eq!(routed.leaves(&[forged.clone(), honest6.clone()], b"hf6"), b'6', "{forged:?}");
    }
    let arriving = routed.arriving(0x0800, &datagram([PEER, OWN], 9), b'4');
    routed.lab.outside.write_all(&arriving).unwrap();
    assert_eq!(next_mark(&mut routed.lab.vm, b"46"), b'4');
    // The namespace has asked for its neighbour from that address.
    let mut advertisement = datagram6([PEER6, OWN6]);
    advertisement[6..8].copy_from_slice(&[58, 255]);
    advertisement.extend([136, 0, 0, 0]);
    for (packet, mark) in [(advertisement, b'n'), (datagram6([PEER6, OWN6]), b'6')] {
        let arriving = routed.arriving(0x86dd, &packet, mark);
        routed.lab.outside.write_all(&arriving).unwrap();
    }
    assert_eq!(next_mark(&mut routed.lab.vm, b"n46"), b'6');
    // Nothing leaves while the connections belong to a checkpoint, and what arrives does.
    routed.pod.set_egress(Egress::Held).unwrap();
    routed.lab.vm.write_all(&honest).unwrap();
    let arriving = routed.arriving(0x0800, &datagram([PEER, OWN], 9), b'4');
    routed.lab.outside.write_all(&arriving).unwrap();
    assert_eq!(next_mark(&mut routed.lab.vm, b"4"), b'4');
    routed.pod.set_egress(Egress::Open).unwrap();
    assert_eq!(routed.leaves(&[honest6], b"h6"), b'6');
}

/// A proxy's connections are its own, and what was redirected to it, too.
#[test]
fn sockets_of_the_namespace_come_before_the_guest() {
    let mut routed = RoutedLab::new();
    let namespace = routed.lab.namespace.as_fd();
    let socket = netns::inside(namespace, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9))).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    for (port, mark) in [(9, b's'), (10, b'g')] {
        let arriving = routed.arriving(0x0800, &datagram([PEER, OWN], port), mark);
        routed.lab.outside.write_all(&arriving).unwrap();
    }
    assert_eq!(next_mark(&mut routed.lab.vm, b"sg"), b'g');
    let mut data = [0; 100];
    assert_eq!(socket.recv_from(&mut data).unwrap(), (64, (PEER, 0x0708).into()));
    // Its own packets to the address are the guest's, from an address that the guest can answer.
    socket.send_to(&[b'l'; 64], (OWN, 10)).unwrap();
    assert_eq!(next_mark(&mut routed.lab.vm, b"l"), b'l');
}

#[test]
fn routes_follow_addresses_and_nothing_stays() {
    let mut lab = Lab::new();
    let setting = |namespace: &OwnedFd, path: &str| {
        let path = format!("/proc/sys/net/{path}");
        netns::inside(namespace.as_fd(), || std::fs::read_to_string(path)).unwrap()
    };
    let settings = ["ipv4/conf/eth0/forwarding", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/accept_ra"];
    let versions = [IpVersion::V4, IpVersion::V6];
    let state = |lab: &mut Lab| {
        let rules = versions.map(|version| lab.socket.rules(version).unwrap());
        (settings.map(|path| setting(&lab.namespace, path)), rules)
    };
    let before = state(&mut lab);
    let mut pod = lab.connect_by(PacketPath::Routed);
    let found = pod.refresh().unwrap();
    assert_ne!(state(&mut lab), before);
    let count = |lab: &mut Lab| versions.map(|version| lab.socket.rules(version).unwrap().len());
    let counted = count(&mut lab);
    // A second look changes nothing.
    assert_eq!(pod.refresh().unwrap(), found);
    assert_eq!(count(&mut lab), counted);
    let index = index(&mut lab.socket, "eth0");
    let second = Ipv4Addr::new(10, 77, 0, 4).into();
    let address = InterfaceAddress { address: second, prefix: 24, broadcast: None, peer: None, scope: 0 };
    lab.socket.add_address(index, &address).unwrap();
    assert_eq!(pod.refresh().unwrap()[0].1.addresses.len(), 3);
    assert_eq!(count(&mut lab), [counted[0] + 2, counted[1]]);
    lab.socket.remove_address(index, &address).unwrap();
    assert_eq!(pod.refresh().unwrap(), found);
    assert_eq!(count(&mut lab), counted);
    pod.disconnect().unwrap();
    assert_eq!(state(&mut lab), before);
    assert_eq!((lab.filters("eth0"), lab.filters("machinen0")), (0, 0));
    let tap = interfaces(&mut lab.socket).unwrap().into_iter().find(|found| found.name == "machinen0");
    assert!(tap.is_some_and(|tap| !tap.up && tap.addresses.is_empty()));
    // What a killed process leaves.
    let mut pod = lab.connect_by(PacketPath::Routed);
    lab.socket.move_to("machinen0", lab.vm_namespace.as_fd(), &tap_name(0)).unwrap();
    pod.refresh().unwrap();
    assert!(remove_rules(&mut lab.socket, lab.namespace.as_fd()).unwrap());
    assert!(!remove_rules(&mut lab.socket, lab.namespace.as_fd()).unwrap());
    assert_eq!(state(&mut lab).1, before.1);
}

#[test]
fn packets_are_routed_to_one_interface() {
    let lab = Lab::new();
    let second = netns::inside(lab.namespace.as_fd(), || tap::create("eth1")).unwrap();
    let mut socket = netns::inside(lab.namespace.as_fd(), NetlinkSocket::new).unwrap();
    let number = index(&mut socket, "eth1");
    socket.set_link(number, "eth1", true, Vec::new()).unwrap();
    let mut pod = PodNamespace::connect(
        lab.namespace.try_clone().unwrap(),
        Some((lab.vm_namespace.try_clone().unwrap(), 2)),
        PacketPath::Routed,
    )
    .unwrap()
    .unwrap()
    .0;
    let refused = pod.refresh().unwrap_err().to_string();
    assert!(refused.contains("(eth0, eth1)") && refused.contains("io.machinen.network=routed"), "{refused}");
    drop(second);
}
