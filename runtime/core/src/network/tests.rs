//! The host's side with real namespaces: a second tap device is the container's interface, so that the test sees what
//! leaves through it, and sends what arrives there.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, OwnedFd},
};

use machinen_base::{netns, sys::tap};
use machinen_netlink::{InterfaceAddress, NetlinkSocket, interfaces, packet};
use machinen_vm::tap_name;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{NetworkError, egress::Egress, namespace::PodNamespace};

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
        let namespace = self.namespace.try_clone().unwrap();
        let tap = self.vm_namespace.try_clone().unwrap();
        let mut pod = PodNamespace::connect(namespace, Some((tap, 2))).unwrap().unwrap().0;
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
    let connect = |taps| PodNamespace::connect(lab.namespace.try_clone().unwrap(), taps).unwrap().unwrap().0;
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
    assert!(PodNamespace::connect(own, None).unwrap().is_none());
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
