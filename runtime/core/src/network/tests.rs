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
use machinen_vm::TAP_NAME;
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
}

impl Lab {
    fn new() -> Self {
        let make = || Ok((tap::create("eth0")?, NetlinkSocket::new()?));
        let (namespace, (outside, mut socket)) = netns::inside_new(make).unwrap();
        let (vm_namespace, vm) = netns::inside_new(|| tap::create(TAP_NAME)).unwrap();
        let index = index(&mut socket, "eth0");
        for (address, prefix) in [(IpAddr::from(OWN), 24), (OWN6.into(), 64)] {
            let address = InterfaceAddress { address, prefix, broadcast: None, peer: None, scope: 0 };
            socket.add_address(index, &address).unwrap();
        }
        socket.set_link(index, "eth0", true, Vec::new()).unwrap();
        Self { namespace, socket, outside: outside.into(), vm_namespace, vm: vm.into() }
    }

    fn connect(&self) -> PodNamespace {
        let namespace = self.namespace.try_clone().unwrap();
        let mut pod = PodNamespace::connect(namespace, &self.vm_namespace).unwrap().unwrap().0;
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
    let interface = pod.refresh().unwrap().unwrap();
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
    assert_eq!(pod.refresh().unwrap().unwrap(), interface);
    assert!(lab.filters("eth0") > 0);
    pod.disconnect().unwrap();
    assert_eq!((lab.filters("eth0"), lab.filters("machinen0")), (0, 0));
    pod.disconnect().unwrap();
}

#[test]
fn a_guest_sends_from_its_own_addresses_only() {
    let mut lab = Lab::new();
    lab.connect().refresh().unwrap().unwrap();
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
fn a_namespace_has_one_vm_and_one_interface() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    let (other, _vm) = netns::inside_new(|| tap::create(TAP_NAME)).unwrap();
    let again = PodNamespace::connect(lab.namespace.try_clone().unwrap(), &other);
    assert!(matches!(again, Err(NetworkError::InUse)), "{again:?}");
    let second = netns::inside(lab.namespace.as_fd(), || tap::create("eth1")).unwrap();
    // An interface that is switched off does not count.
    assert!(pod.refresh().unwrap().is_some());
    let number = index(&mut lab.socket, "eth1");
    lab.socket.set_link(number, "eth1", true, Vec::new()).unwrap();
    let refused = pod.refresh().unwrap_err().to_string();
    assert_eq!(refused, "the network namespace has 2 interfaces (eth0, eth1), and a VM has one");
    drop(second);
    assert!(pod.refresh().unwrap().is_some());
    // The namespace of this process is the host's.
    let own = netns::open(std::path::Path::new("/proc/self/ns/net")).unwrap();
    assert!(PodNamespace::connect(own, &other).unwrap().is_none());
}

#[test]
fn nothing_leaves_while_the_connections_belong_to_a_checkpoint() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    pod.refresh().unwrap().unwrap();
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
    let (name, counters) = pod.counters().unwrap().unwrap();
    assert_eq!(name, "eth0");
    assert!(counters.received.packets >= 1 && counters.sent.packets >= 4, "{counters:?}");
}

#[test]
fn the_hosts_kernel_resets_no_connection_of_a_checkpoint() {
    let mut lab = Lab::new();
    let mut pod = lab.connect();
    pod.refresh().unwrap().unwrap();
    pod.set_egress(Egress::Held).unwrap();
    pod.disconnect().unwrap();
    let resets = |lab: &mut Lab| lab.filters_at("eth0", packet::tc::TcHandle::MIN_EGRESS);
    assert_ne!(resets(&mut lab), 0);
    assert_eq!(lab.filters("eth0"), 0);
    // The next container has the connections.
    let (other, _tap) = netns::inside_new(|| tap::create(TAP_NAME)).unwrap();
    lab.socket.move_to("machinen0", other.as_fd(), "old").unwrap();
    lab.vm_namespace = other;
    let mut pod = lab.connect();
    pod.refresh().unwrap().unwrap();
    assert_eq!(resets(&mut lab), 0);
}
