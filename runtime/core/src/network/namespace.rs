//! The host's side of a pod's network: the namespace, its interface, and the VM's tap device in it.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use machinen_base::netns::{self, NetnsId};
use machinen_netlink::{Interface, NetlinkSocket, interfaces, packet::link::LinkAttribute};
use machinen_vm::TAP_NAME;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{
    NetworkError,
    egress::Egress,
    filter::Sources,
    wiring::{disconnect, pass_resets, redirect_all, redirect_own, replace_own},
};
use crate::spec::{bundle, guest};

/// The name of a VM's tap device in the namespace of its pod.
pub(super) const DEVICE: &str = "machinen0";

/// The groups of events that change what the guest has (rtnetlink.h, RTNLGRP): links, addresses, routes, neighbours.
const EVENTS: [u32; 6] = [1, 3, 5, 7, 9, 11];

const LINK_EVENTS: [u32; 1] = [1];

/// The kernel kills QEMU when its owner ends.
const VM_ENDS_WITHIN: Duration = Duration::from_secs(1);

/// A network namespace with the tap device of a VM in it.
#[derive(Debug)]
pub(super) struct PodNamespace {
    pub(super) id: NetnsId,
    pub(super) socket: NetlinkSocket,
    /// The interface whose packets are redirected.
    pub(super) connected: Option<Connected>,
    pub(super) egress: Egress,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connected {
    pub(super) name: String,
    pub(super) interface: u32,
    tap: u32,
    mtu: u32,
    sources: Sources,
}

impl Connected {
    /// Whether the two differ in nothing but the addresses of the guest.
    fn has_ends_of(&self, other: &Self) -> bool {
        let ends = |it: &Self| (it.interface, it.tap, it.mtu);
        ends(self) == ends(other)
    }
}

impl PodNamespace {
    /// Moves the tap device to the namespace. Returns the namespace with a socket that is readable after each change.
    /// Returns None if the namespace is the one of this process.
    pub(super) fn connect(
        namespace: OwnedFd,
        tap: &OwnedFd,
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
        let mut first = netns::inside(tap.as_fd(), NetlinkSocket::new).map_err(NetworkError::Enter)?;
        match first.move_to(TAP_NAME, namespace.as_fd(), DEVICE) {
            Err(error) if error.errno() == Some(libc::EEXIST) => return Err(NetworkError::InUse),
            moved => moved?,
        }
        Ok(Some((Self { id, socket, connected: None, egress: Egress::default() }, changes)))
    }

    /// Reads the namespace, and connects its interface with the tap device. Returns the interface if there is one.
    pub(super) fn refresh(&mut self) -> Result<Option<Interface>, NetworkError> {
        let all = interfaces(&mut self.socket)?;
        let tap = all.iter().find(|interface| interface.name == DEVICE).map(|interface| interface.index);
        let mut used = all.into_iter().filter(|found| found.up && !found.loopback && found.name != DEVICE);
        let (interface, others) = (used.next(), used.map(|other| other.name).collect::<Vec<_>>());
        if let Some(interface) = &interface
            && !others.is_empty()
        {
            let names = std::iter::once(interface.name.clone()).chain(others).collect();
            return Err(NetworkError::TooMany { names });
        }
        let Some((interface, tap)) = interface.zip(tap) else {
            self.disconnect()?;
            return Ok(None);
        };
        let Ok(mac) = <[u8; 6]>::try_from(&*interface.mac) else {
            return Err(NetworkError::NotEthernet { name: interface.name });
        };
        if interface.shared_routes > 0 {
            tracing::warn!(
                interface = interface.name,
                "{} routes with several next hops are not in the guest",
                interface.shared_routes
            );
        }
        let addresses = interface.addresses.iter().map(|address| address.address);
        let sources = Sources { mac, addresses: self.egress.of(addresses) };
        let (name, index, mtu) = (interface.name.clone(), interface.index, interface.mtu);
        self.wire(Connected { name, interface: index, tap, mtu, sources })?;
        Ok(Some(interface))
    }

    fn wire(&mut self, wanted: Connected) -> Result<(), NetworkError> {
        if self.connected.as_ref() == Some(&wanted) {
            return Ok(());
        }
        if let Some(connected) = self.connected.take_if(|connected| connected.has_ends_of(&wanted)) {
            let Connected { interface, tap, sources, .. } = &wanted;
            if let Err(error) = replace_own(&mut self.socket, *tap, *interface, sources) {
                // The next attempt begins anew.
                self.connected = Some(connected);
                self.disconnect()?;
                return Err(error.into());
            }
            self.connected = Some(wanted);
            return Ok(());
        }
        self.disconnect()?;
        let Connected { interface, tap, mtu, sources, .. } = &wanted;
        // The filters come first, so that no packet of the guest reaches the host's own network code.
        let up = redirect_own(&mut self.socket, *tap, *interface, sources)
            .and_then(|()| self.socket.set_link(*tap, DEVICE, true, vec![LinkAttribute::Mtu(*mtu)]))
            .and_then(|()| redirect_all(&mut self.socket, *interface, *tap))
            // The connections of an earlier container, which has ended with its checkpoint, can be this one's.
            .and_then(|()| pass_resets(&mut self.socket, *interface));
        // Also after an error, something is to be removed.
        self.connected = Some(wanted);
        Ok(up?)
    }

    /// Removes what redirects packets. Does nothing where it is gone already.
    pub(super) fn disconnect(&mut self) -> Result<(), NetworkError> {
        if let Some(Connected { interface, tap, .. }) = self.connected.take() {
            self.keep_connections(interface);
            disconnect(&mut self.socket, interface)?;
            disconnect(&mut self.socket, tap)?;
        }
        Ok(())
    }
}

/// Removes what a killed process has left in the network namespace of the bundle's container: the redirection of
/// packets to a tap device that exists no more. A namespace or a bundle that is gone has nothing left.
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
        if all.iter().all(|interface| interface.name != DEVICE) {
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
