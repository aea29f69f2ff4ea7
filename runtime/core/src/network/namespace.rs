//! The host's side of a pod's network: the namespace, its interfaces, and the VM's tap devices in it.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use machinen_base::netns::{self, NetnsId};
use machinen_netlink::{
    Interface, InterfaceCounters, NetlinkError, NetlinkSocket, counters, interfaces,
    packet::link::LinkAttribute,
};
use machinen_vm::{MAX_NICS, tap_name};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    NetworkError,
    egress::Egress,
    filter::Sources,
    routed::{self, Ends, RoutedGuest, remove_rules},
    settings::{ChangedSettings, Reread, Settings},
    wiring::{Onward, admit_own, disconnect, pass_resets, redirect_all, replace_own},
};
use crate::spec::{bundle, guest};

/// The name of a VM's tap device in the namespace of its pod, by the number of the VM's network device.
fn device_name(device: u32) -> String {
    format!("machinen{device}")
}

/// Whether an interface is a VM's tap device.
fn is_device(interface: &Interface) -> bool {
    (0..MAX_NICS).any(|device| interface.name == device_name(device))
}

/// How packets pass between the namespace's interfaces and a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PacketPath {
    /// From one device to the other: the network code of the namespace sees none.
    #[default]
    Redirected,
    /// Through the network code of the namespace, with its routes and the rules that others have there.
    Routed,
}

/// The groups of events that change what the guest has (rtnetlink.h, RTNLGRP): links, addresses, routes, neighbours.
const EVENTS: [u32; 6] = [1, 3, 5, 7, 9, 11];

const LINK_EVENTS: [u32; 1] = [1];

/// The kernel kills QEMU when its owner ends.
const VM_ENDS_WITHIN: Duration = Duration::from_secs(1);

/// A network namespace whose interfaces are those of a VM.
#[derive(Debug)]
pub(super) struct PodNamespace {
    pub(super) id: NetnsId,
    namespace: OwnedFd,
    socket: NetlinkSocket,
    /// The namespace in which the VM's tap devices were made, if the VM has any.
    first: Option<OwnedFd>,
    /// The VM's network devices, by their numbers.
    devices: Vec<Device>,
    settings: ChangedSettings,
    pub(super) path: PacketPath,
    pub(super) egress: Egress,
}

#[derive(Debug, Default)]
struct Device {
    /// Its tap device is in the pod's namespace.
    moved: bool,
    /// The interface whose packets are redirected.
    connected: Option<Connected>,
    /// What is routed to the guest, if packets are.
    routed: Option<RoutedGuest>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Connected {
    name: String,
    interface: u32,
    tap_name: String,
    tap: u32,
    mtu: u32,
    sources: Sources,
    /// The addresses that are routed to the guest.
    routed: Vec<IpAddr>,
}

impl Connected {
    /// Whether the two differ in nothing but the addresses of the guest.
    fn has_ends_of(&self, other: &Self) -> bool {
        let ends = |it: &Self| (it.name.clone(), it.interface, it.tap, it.mtu);
        ends(self) == ends(other)
    }

    fn ends<'a>(&'a self, namespace: BorrowedFd<'a>) -> Ends<'a> {
        Ends {
            namespace,
            interface: &self.name,
            index: self.interface,
            tap_name: &self.tap_name,
            tap: self.tap,
            guest_mac: self.sources.mac,
        }
    }
}

impl PodNamespace {
    /// Returns the namespace with a socket that is readable after each change; None if the namespace is the one of this
    /// process. `taps`: the namespace in which the VM's tap devices are, and their number. A device moves when there is
    /// an interface to connect it with, because most containers have none.
    pub(super) fn connect(
        namespace: OwnedFd,
        taps: Option<(OwnedFd, u32)>,
        path: PacketPath,
    ) -> Result<Option<(Self, NetlinkSocket)>, NetworkError> {
        let id = netns::id(&namespace).map_err(NetworkError::Enter)?;
        if id == netns::own_id().map_err(NetworkError::Enter)? {
            tracing::warn!(
                "the network namespace is the host's own: the container has only its loopback interface"
            );
            return Ok(None);
        }
        let sockets = || Ok((NetlinkSocket::new()?, NetlinkSocket::subscribe(&EVENTS)?));
        let (socket, changes) = netns::inside(namespace.as_fd(), sockets).map_err(NetworkError::Enter)?;
        let (first, count) = taps.map_or((None, 0), |(first, count)| (Some(first), count));
        let devices = (0..count).map(|_| Device::default()).collect();
        let (settings, egress) = (ChangedSettings::default(), Egress::default());
        Ok(Some((Self { id, namespace, socket, first, devices, settings, path, egress }, changes)))
    }

    /// Another descriptor of the namespace.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, NetworkError> {
        self.namespace.try_clone().map_err(NetworkError::Enter)
    }

    /// Does what [`Self::refresh`] does, and also returns the settings of the namespace that have been changed. A namespace
    /// without interfaces is not examined for them.
    pub(super) fn reread(&mut self, what: Reread) -> Result<(Vec<(u32, Interface)>, Settings), NetworkError> {
        let connected = self.refresh()?;
        let has_settings = what == Reread::Settings && !connected.is_empty();
        if let Some(usual) = self.first.as_ref().filter(|_| has_settings) {
            let read = self.settings.read(self.namespace.as_fd(), usual.as_fd());
            read.map_err(NetworkError::Settings)?;
        }
        Ok((connected, self.settings.last().clone()))
    }

    /// Reads the namespace, and connects each of its interfaces with a device of the VM. Returns the numbers of the
    /// devices with their interfaces. An interface keeps its device as long as it exists.
    pub(super) fn refresh(&mut self) -> Result<Vec<(u32, Interface)>, NetworkError> {
        let used: Vec<_> = interfaces(&mut self.socket)?
            .into_iter()
            .filter(|found| found.up && !found.loopback && !is_device(found))
            .collect();
        let names = || used.iter().map(|interface| interface.name.clone()).collect();
        if self.path == PacketPath::Routed && used.len() > 1 {
            return Err(NetworkError::SeveralRouted { names: names() });
        }
        if used.len() > self.devices.len() {
            if self.devices.is_empty() {
                return Err(NetworkError::NoDevice);
            }
            return Err(NetworkError::TooMany { devices: self.devices.len(), names: names() });
        }
        let is_used = |connected: &Connected| used.iter().any(|found| found.index == connected.interface);
        for device in &mut self.devices {
            if device.connected.as_ref().is_some_and(|connected| !is_used(connected)) {
                device.disconnect(&mut self.socket, self.namespace.as_fd(), self.egress)?;
            }
        }
        let mut connected = Vec::new();
        for interface in used {
            let number = self.device_of(&interface);
            connected.extend(self.connect_device(number, interface)?.map(|interface| (number, interface)));
        }
        connected.sort_by_key(|(number, _)| *number);
        Ok(connected)
    }

    /// The device that is connected with the interface, or one that is connected with none. There is such a device.
    fn device_of(&self, interface: &Interface) -> u32 {
        let with = |index: Option<u32>| {
            let of = |device: &Device| device.connected.as_ref().map(|connected| connected.interface);
            self.devices.iter().position(|device| of(device) == index)
        };
        let found = with(Some(interface.index)).or_else(|| with(None));
        u32::try_from(found.expect("there are as many devices as interfaces")).expect("there are few")
    }

    /// Returns the interface as the guest has it; None if the tap device was removed from the namespace.
    fn connect_device(
        &mut self,
        number: u32,
        interface: Interface,
    ) -> Result<Option<Interface>, NetworkError> {
        let Ok(mac) = <[u8; 6]>::try_from(&*interface.mac) else {
            return Err(NetworkError::NotEthernet { name: interface.name });
        };
        if interface.shared_routes > 0 && self.path == PacketPath::Redirected {
            tracing::warn!(
                interface = interface.name,
                "{} routes with several next hops are not in the guest",
                interface.shared_routes
            );
        }
        self.move_tap(number)?;
        let tap_name = device_name(number);
        let all = interfaces(&mut self.socket)?;
        let device = &mut self.devices[number as usize];
        let Some(tap) = all.iter().find(|found| found.name == tap_name) else {
            device.disconnect(&mut self.socket, self.namespace.as_fd(), self.egress)?;
            return Ok(None);
        };
        let (seen, routed) = match self.path {
            PacketPath::Redirected => (interface, Vec::new()),
            PacketPath::Routed => {
                (routed::guest_interface(&interface, &tap.mac), routed::addresses(&interface))
            }
        };
        let addresses = seen.addresses.iter().map(|address| address.address);
        let sources = Sources { mac, addresses: self.egress.of(addresses) };
        let (name, index, mtu) = (seen.name.clone(), seen.index, seen.mtu);
        let wanted = Connected { name, interface: index, tap_name, tap: tap.index, mtu, sources, routed };
        device.wire(&mut self.socket, self.namespace.as_fd(), wanted, self.path, self.egress)?;
        Ok(Some(seen))
    }

    /// Moves the tap device to the namespace, if that was not done before.
    fn move_tap(&mut self, number: u32) -> Result<(), NetworkError> {
        let device = &mut self.devices[number as usize];
        let Some(first) = self.first.as_ref().filter(|_| !device.moved) else { return Ok(()) };
        let mut socket = netns::inside(first.as_fd(), NetlinkSocket::new).map_err(NetworkError::Enter)?;
        match socket.move_to(&tap_name(number), self.namespace.as_fd(), &device_name(number)) {
            Err(error) if error.errno() == Some(libc::EEXIST) => return Err(NetworkError::InUse),
            moved => moved?,
        }
        device.moved = true;
        Ok(())
    }

    /// Lets packets of the guest leave, or not. A namespace that has changed in a way that does not fit is reported by the
    /// next refresh.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn set_egress(&mut self, egress: Egress) -> Result<(), NetworkError> {
        self.egress = egress;
        if self.devices.iter().any(|device| device.connected.is_some()) {
            self.refresh().map(drop)
        } else {
            Ok(())
        }
    }

    /// The names of the guest's interfaces with their counts, as the guest has them: what a tap device sends is what the
    /// guest receives.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn counters(&mut self) -> Result<Vec<(String, InterfaceCounters)>, NetworkError> {
        let mut found = Vec::new();
        for connected in self.devices.iter().filter_map(|device| device.connected.as_ref()) {
            if let Some(tap) = counters(&mut self.socket, &connected.tap_name)? {
                let of_guest = InterfaceCounters { received: tap.sent, sent: tap.received };
                found.push((connected.name.clone(), of_guest));
            }
        }
        Ok(found)
    }

    /// Removes what redirects packets. Does nothing where it is gone already.
    pub(super) fn disconnect(&mut self) -> Result<(), NetworkError> {
        let (namespace, egress) = (self.namespace.as_fd(), self.egress);
        let mut devices = self.devices.iter_mut();
        devices.try_for_each(|device| device.disconnect(&mut self.socket, namespace, egress))
    }
}

impl Device {
    fn wire(
        &mut self,
        socket: &mut NetlinkSocket,
        namespace: BorrowedFd<'_>,
        wanted: Connected,
        path: PacketPath,
        egress: Egress,
    ) -> Result<(), NetworkError> {
        if self.connected.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let same_ends = self.connected.take_if(|connected| connected.has_ends_of(&wanted));
        if same_ends.is_none() {
            self.disconnect(socket, namespace, egress)?;
        }
        // Also after an error, something is to be removed.
        let wanted = self.connected.insert(wanted);
        let wired = match path {
            PacketPath::Redirected => redirect(socket, wanted, same_ends.is_some()).map_err(Into::into),
            PacketPath::Routed => {
                let routed = self.routed.get_or_insert_default();
                route(socket, wanted, wanted.ends(namespace), routed, same_ends.is_some())
            }
        };
        if wired.is_err() && same_ends.is_some() {
            // The next attempt begins anew.
            self.disconnect(socket, namespace, egress)?;
        }
        wired
    }

    fn disconnect(
        &mut self,
        socket: &mut NetlinkSocket,
        namespace: BorrowedFd<'_>,
        egress: Egress,
    ) -> Result<(), NetworkError> {
        let Some(Connected { interface, tap, tap_name, .. }) = self.connected.take() else { return Ok(()) };
        egress.keep_connections(socket, interface);
        let routed = match self.routed.take() {
            Some(mut routed) => {
                // Without its filters, the device must not lead to the namespace's network code.
                let down = switch_off(socket, tap, &tap_name).map_err(Into::into);
                routed.end(socket, namespace).and(down)
            }
            None => Ok(()),
        };
        disconnect(socket, interface)?;
        disconnect(socket, tap)?;
        routed
    }
}

/// Switches the device off, with the addresses that it has. It may have disappeared.
fn switch_off(socket: &mut NetlinkSocket, tap: u32, name: &str) -> Result<(), NetlinkError> {
    let off =
        socket.set_link(tap, name, false, Vec::new()).and_then(|()| routed::take_addresses(socket, tap));
    match off {
        Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
        off => off,
    }
}

/// Redirects packets between the interface and the tap. `again`: they are redirected already, from other addresses.
fn redirect(socket: &mut NetlinkSocket, wanted: &Connected, again: bool) -> Result<(), NetlinkError> {
    let Connected { interface, tap_name, tap, mtu, sources, .. } = wanted;
    let onward = Onward::To(*interface);
    if again {
        return replace_own(socket, *tap, onward, sources);
    }
    // The filters come first, so that no packet of the guest reaches the host's own network code.
    admit_own(socket, *tap, onward, sources)?;
    socket.set_link(*tap, tap_name, true, vec![LinkAttribute::Mtu(*mtu)])?;
    redirect_all(socket, *interface, *tap)?;
    // The connections of an earlier container, which has ended with its checkpoint, can be this one's.
    pass_resets(socket, *interface)
}

/// Has the namespace route packets between the interface and the tap. `again`: it does so already, for other addresses.
fn route(
    socket: &mut NetlinkSocket,
    wanted: &Connected,
    ends: Ends<'_>,
    guest: &mut RoutedGuest,
    again: bool,
) -> Result<(), NetworkError> {
    let Connected { interface, tap_name, tap, mtu, sources, routed, .. } = wanted;
    if again {
        replace_own(socket, *tap, Onward::Routed, sources)?;
        return guest.route(socket, ends, routed);
    }
    admit_own(socket, *tap, Onward::Routed, sources)?;
    // All addresses of the device are given to it.
    routed::without_own_addresses(ends)?;
    socket.set_link(*tap, tap_name, true, vec![LinkAttribute::Mtu(*mtu)])?;
    guest.route(socket, ends, routed)?;
    Ok(pass_resets(socket, *interface)?)
}

/// Removes what a killed process has left in the network namespace of the bundle's container: the redirection of
/// packets to a tap device that exists no more, and the rules that routed them. A namespace or a bundle that is gone has nothing left.
///
/// # Errors
/// The kernel refuses.
pub fn disconnect_abandoned(bundle: &Path) -> Result<(), NetworkError> {
    let Ok(spec) = bundle::load(bundle) else { return Ok(()) };
    let Some(path) = guest::network_namespace(&spec) else { return Ok(()) };
    let namespace = match netns::open(&path) {
        Ok(namespace) => namespace,
        // It was removed, or its path is on a file system that was.
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::InvalidInput].contains(&error.kind()) => {
            return Ok(());
        }
        Err(error) => return Err(NetworkError::Enter(error)),
    };
    let id = netns::id(&namespace).map_err(NetworkError::Enter)?;
    if id == netns::own_id().map_err(NetworkError::Enter)? {
        return Ok(());
    }
    let sockets = || Ok((NetlinkSocket::new()?, NetlinkSocket::subscribe(&LINK_EVENTS)?));
    let (mut socket, changes) = netns::inside(namespace.as_fd(), sockets).map_err(NetworkError::Enter)?;
    let Some(all) = without_vm(&mut socket, &changes)? else { return Ok(()) };
    remove_rules(&mut socket, namespace.as_fd())?;
    let mut others = all.iter().filter(|interface| !interface.loopback);
    Ok(others.try_for_each(|interface| disconnect(&mut socket, interface.index))?)
}

/// Whether the path is that of the same network namespace as another path, which may lead nowhere.
///
/// # Errors
/// The first path leads to no network namespace.
pub fn same_namespace(path: &Path, other: Option<&Path>) -> io::Result<bool> {
    let id = netns::id(&netns::open(path)?)?;
    Ok(other.is_some_and(|other| {
        netns::open(other).and_then(|other| netns::id(&other)).is_ok_and(|other| other == id)
    }))
}

/// The interfaces of the namespace once no VM has its tap device there. A VM ends soon after the process that owned it.
/// Returns None if the VM is still there after that: it belongs to another process.
fn without_vm(
    socket: &mut NetlinkSocket,
    changes: &NetlinkSocket,
) -> Result<Option<Vec<Interface>>, NetworkError> {
    let deadline = Instant::now() + VM_ENDS_WITHIN;
    loop {
        changes.drain().map_err(NetworkError::Watch)?;
        let all = interfaces(socket)?;
        if !all.iter().any(is_device) {
            return Ok(Some(all));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(NetworkError::Watch(error.into())),
        }
    }
}
