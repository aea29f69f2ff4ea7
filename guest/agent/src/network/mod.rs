//! The network devices of the VM, as the host wants them to be.
//!
//! ```text
//!   namespace of the agent          hidden namespace
//!   (and of all containers)
//!     lo                              nic0, nic1, ...     devices without a network
//!     eth0  <──── configure ────────  nic0
//! ```
//! A VM has its devices from birth, and most containers have no network. Such a container must see the loopback
//! interface only, as on a host, so an unused device is in a namespace that no process is in.
//!
//! A clone has the first device in a third namespace, where it is switched on already ([`prepared`]). If the VM gets a
//! network before its first container, the agent goes there instead of moving the device to where it is.

mod apply;
pub(crate) mod localhost;
mod nameservers;
mod prepared;
mod settings;

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    sync::{Mutex, MutexGuard},
};

use machinen_netlink::{
    Interface, InterfaceAddress, InvalidInterface, Neighbour, NetlinkError, NetlinkSocket, Route,
    from_message, interfaces, to_message,
};
use machinen_protocol::{
    api::{ConfigureNetworkRequest, NetworkInterface},
    error::{ErrorKind, HasKind},
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns, unshare},
};

use crate::{
    console,
    engine::{Engine, EngineError},
};

pub(crate) use localhost::Localhost;
pub(crate) use nameservers::Nameservers;
use prepared::Prepared;
pub(crate) use prepared::sysfs;

const OWN: &str = "/proc/thread-self/ns/net";

#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("cannot make a network namespace")]
    Namespace(#[source] io::Error),
    #[error("cannot enter the network namespace of the VM's first containers")]
    Enter(#[source] Errno),
    #[error("cannot mount {0} in a network namespace")]
    Mount(&'static str, #[source] Errno),
    #[error(transparent)]
    Invalid(#[from] InvalidInterface),
    #[error("the VM has no network device {0}")]
    NoDevice(u32),
    #[error("the network interface {0} has disappeared")]
    Missing(String),
    #[error("network device {0} was requested twice")]
    Twice(u32),
    #[error("cannot set {path} to {value}")]
    Setting { path: String, value: String, source: io::Error },
    #[error("{0:?} is no setting of a network namespace")]
    SettingName(String),
    #[error("the VM's network cannot be configured")]
    Kernel(#[from] NetlinkError),
}

impl HasKind for NetworkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) | Self::Twice(_) | Self::SettingName(_) => ErrorKind::InvalidArgument,
            Self::NoDevice(_) => ErrorKind::NotFound,
            Self::Kernel(_) | Self::Missing(_) | Self::Setting { .. } => ErrorKind::FailedPrecondition,
            Self::Namespace(_) | Self::Enter(_) | Self::Mount(..) => ErrorKind::Internal,
        }
    }
}

/// The VM's network devices.
#[derive(Debug)]
pub(crate) struct Network(Mutex<Devices>);

#[derive(Debug)]
struct Devices {
    own: Namespace,
    hidden: Namespace,
    /// The present name of each device that the containers see. Its index is the device's number.
    names: Vec<Option<String>>,
    /// Where the first device is while it has no name.
    prepared: Option<Prepared>,
    /// What the first device has, if nothing has changed since this was read.
    known: Option<Interface>,
}

#[derive(Debug)]
struct Namespace {
    file: File,
    socket: NetlinkSocket,
}

impl Namespace {
    /// The one that this thread is in.
    fn of_this_thread() -> io::Result<Self> {
        Ok(Self { file: File::open(OWN)?, socket: NetlinkSocket::new()? })
    }
}

impl Network {
    /// Moves all devices to a hidden namespace.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn hide_devices() -> Result<Self, NetworkError> {
        let (mut own, hidden) = namespaces().map_err(NetworkError::Namespace)?;
        let mut devices: Vec<_> = interfaces(&mut own.socket)?
            .into_iter()
            .filter(|found| !found.loopback && is_ethernet(&found.mac))
            .collect();
        // The host numbers them by the addresses with which it makes them.
        devices.sort_by_key(|device| device.mac.clone());
        for (number, device) in devices.iter().enumerate() {
            own.socket.move_to(&device.name, hidden.file.as_fd(), &hidden_name(number))?;
        }
        let names = vec![None; devices.len()];
        Ok(Self(Mutex::new(Devices { own, hidden, names, prepared: None, known: None })))
    }

    /// Does what `ConfigureNetwork` asks for.
    ///
    /// # Errors
    /// A value is not valid, a device does not exist, or the kernel refuses.
    pub(crate) fn configure(&self, request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
        let mut devices = self.devices();
        let mut wanted = vec![None; devices.names.len()];
        for message in &request.interfaces {
            let place = usize::try_from(message.device).ok().and_then(|number| wanted.get_mut(number));
            let place = place.ok_or(NetworkError::NoDevice(message.device))?;
            if place.replace(from_message(message)?).is_some() {
                return Err(NetworkError::Twice(message.device));
            }
        }
        settings::set_all(&request.settings)?;
        // A name that is given up may be the new name of another device.
        for (number, wanted) in wanted.iter().enumerate() {
            let name = wanted.as_ref().map(|wanted| &wanted.name);
            if devices.names[number].is_some() && devices.names[number].as_ref() != name {
                devices.hide(number)?;
            }
        }
        for (number, wanted) in wanted.iter().enumerate() {
            if let Some(wanted) = wanted {
                devices.show(number, &wanted.name)?;
                let known = if number == 0 { devices.known.take() } else { None };
                apply::apply(&mut devices.own.socket, wanted, request.announce, known)?;
            }
        }
        Ok(())
    }

    /// Configures the first device, and hides it again. The code for that, and what the kernel loads when it is first
    /// used, are then in memory in every clone.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn warm_up(&self) -> Result<(), NetworkError> {
        if self.devices().names.is_empty() {
            return Ok(());
        }
        let request = ConfigureNetworkRequest { interfaces: vec![sample()], ..Default::default() };
        self.configure(&request)?;
        self.configure(&ConfigureNetworkRequest::default())?;
        let mut devices = self.devices();
        let Devices { own, hidden, .. } = &mut *devices;
        let prepared = Prepared::make(&own.file, hidden, &hidden_name(0))?;
        devices.prepared = Some(prepared);
        Ok(())
    }

    /// Has this process and all later ones in the namespace with the first device, if the template has prepared one that
    /// fits the request. No container may exist: it would stay behind.
    ///
    /// # Errors
    /// The kernel refuses, after it has let the engine in.
    pub(crate) async fn enter_prepared(
        &self,
        engine: &Engine,
        request: &ConfigureNetworkRequest,
    ) -> Result<(), NetworkError> {
        let fits = |prepared: &mut Prepared| {
            request.interfaces.iter().any(|it| it.device == 0 && it.name == prepared.interface.name)
        };
        let Some(Prepared { namespace, interface }) = self.devices().prepared.take_if(fits) else {
            return Ok(());
        };
        let entered = async {
            let file = namespace.file.try_clone().map_err(EngineError::Namespace)?;
            engine.enter_network(file.into()).await
        };
        if let Err(err) = entered.await {
            // The device can still be moved.
            console::report(&err);
            self.devices().prepared = Some(Prepared { namespace, interface });
            return Ok(());
        }
        setns(&namespace.file, CloneFlags::CLONE_NEWNET).map_err(NetworkError::Enter)?;
        let mut devices = self.devices();
        devices.own = namespace;
        devices.names[0] = Some(interface.name.clone());
        devices.known = Some(interface);
        Ok(())
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.0.lock().expect("no panic while held")
    }
}

impl Devices {
    fn hide(&mut self, number: usize) -> Result<(), NetworkError> {
        if let Some(name) = &self.names[number] {
            self.own.socket.move_to(name, self.hidden.file.as_fd(), &hidden_name(number))?;
            self.names[number] = None;
            self.known = self.known.take().filter(|_| number > 0);
        }
        Ok(())
    }

    fn show(&mut self, number: usize, name: &str) -> Result<(), NetworkError> {
        if self.names[number].is_none() {
            let own = self.own.file.as_fd();
            match self.prepared.take_if(|_| number == 0) {
                Some(mut prepared) => {
                    prepared.namespace.socket.move_to(&prepared.interface.name, own, name)?;
                }
                None => self.hidden.socket.move_to(&hidden_name(number), own, name)?,
            }
            self.names[number] = Some(name.to_owned());
        }
        Ok(())
    }
}

/// An interface with all that one can have; its addresses are those for documentation (RFC 5737, RFC 3849).
fn sample() -> NetworkInterface {
    let addresses = [IpAddr::from([192, 0, 2, 2]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 2])];
    let gateways = [IpAddr::from([192, 0, 2, 1]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])];
    let any = [IpAddr::from([0; 4]), IpAddr::from([0_u16; 8])];
    let address = |address| InterfaceAddress { address, prefix: 24, broadcast: None, peer: None, scope: 0 };
    let route = |destination: IpAddr, gateway: Option<IpAddr>, scope| Route {
        destination,
        prefix: if gateway.is_none() { 24 } else { 0 },
        gateway,
        onlink: gateway.is_some(),
        source: None,
        metric: 7,
        scope,
        protocol: 4,
    };
    let networks = [IpAddr::from([192, 0, 2, 0]), IpAddr::from([0x2001, 0xd00, 0, 0, 0, 0, 0, 0])];
    let routes = networks.map(|network| route(network, None, if network.is_ipv4() { 253 } else { 0 }));
    let defaults = [0, 1].map(|kind| route(any[kind], Some(gateways[kind]), 0));
    let mac = vec![2, 0, 0, 0, 0, 2];
    let neighbour = |address| Neighbour { address, mac: mac.clone() };
    to_message(
        0,
        &Interface {
            name: "eth0".to_owned(),
            mtu: 1450,
            addresses: addresses.map(address).into(),
            neighbours: gateways.map(neighbour).into(),
            routes: [routes, defaults].concat(),
            mac: mac.clone(),
            ..Interface::default()
        },
    )
}

fn hidden_name(number: usize) -> String {
    format!("nic{number}")
}

/// Tunnels that some kernels make in each namespace have other addresses.
fn is_ethernet(mac: &[u8]) -> bool {
    mac.len() == 6
}

/// This thread's namespace, and a new one.
fn namespaces() -> io::Result<(Namespace, Namespace)> {
    let own = Namespace::of_this_thread()?;
    let hidden = in_new_namespace(&own.file, Namespace::of_this_thread)??;
    Ok((own, hidden))
}

/// Does something in a new namespace, and returns to that of this thread.
fn in_new_namespace<T>(own: &File, act: impl FnOnce() -> T) -> io::Result<T> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let done = act();
    setns(own, CloneFlags::CLONE_NEWNET)?;
    Ok(done)
}
