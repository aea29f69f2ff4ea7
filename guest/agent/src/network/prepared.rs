//! A network namespace in which the VM's first device is switched on before the VM has a network.
//!
//! To move a device between namespaces, and to switch it on, takes the kernel longer than to give it addresses, so a
//! template does both for its clones. The VM's containers have one network namespace. If the network is there before the
//! first of them, that namespace is this one.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use machinen_netlink::{Interface, NetlinkSocket};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use super::{Namespace, NetworkError, OWN, apply, in_new_namespace};
use crate::{cgroup, sys};

/// The name that nearly every container's interface has.
const NAME: &str = "eth0";
/// The namespace, for comparison, and its sysfs.
const NAMESPACE: &str = "/run/machinen-network";
const SYSFS: &str = "/run/machinen-sys";
/// Changes of links (rtnetlink.h).
const RTNLGRP_LINK: u32 = 1;
/// After this time the kernel has completed a change of a link, ms.
const LINK_WITHIN: u16 = 1_500;

#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) namespace: Namespace,
    /// The device as it is there.
    pub(super) interface: Interface,
}

impl Prepared {
    /// Makes the namespace. `own`: that of this thread; `device`: the name of the device in the hidden one, where it
    /// stays if this fails.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn make(own: &File, hidden: &mut Namespace, device: &str) -> Result<Self, NetworkError> {
        let made = in_new_namespace(own, || {
            let mut namespace = Namespace::of_this_thread().map_err(NetworkError::Namespace)?;
            loopback_up().map_err(|source| NetworkError::Namespace(source.into()))?;
            mount_sysfs()?;
            bind(OWN, NAMESPACE)?;
            hidden.socket.move_to(device, namespace.file.as_fd(), NAME)?;
            match switch_on(&mut namespace.socket) {
                Ok(interface) => Ok(Self { namespace, interface }),
                Err(error) => {
                    namespace.socket.move_to(NAME, hidden.file.as_fd(), device)?;
                    Err(error)
                }
            }
        });
        made.map_err(NetworkError::Namespace)?
    }
}

fn switch_on(socket: &mut NetlinkSocket) -> Result<Interface, NetworkError> {
    let changes = NetlinkSocket::subscribe(&[RTNLGRP_LINK]).map_err(NetworkError::Namespace)?;
    let interface = apply::switch_on(socket, NAME)?;
    wait_for_link(&changes).map_err(NetworkError::Namespace)?;
    Ok(interface)
}

/// The path of a sysfs that shows the network namespace of this thread.
pub(crate) fn sysfs() -> &'static str {
    let identity = |path: &str| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let entered = identity(NAMESPACE).is_some_and(|prepared| identity(OWN) == Some(prepared));
    if entered { SYSFS } else { "/sys" }
}

fn loopback_up() -> Result<(), Errno> {
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    sys::loopback_up(any.as_fd())
}

/// Waits for the notification with which the kernel has completed the change. It comes from a worker of the kernel within a
/// second, and each clone would have that work otherwise.
fn wait_for_link(changes: &NetlinkSocket) -> io::Result<()> {
    // Those that were sent during the call.
    changes.drain()?;
    poll(&mut [PollFd::new(changes.as_fd(), PollFlags::POLLIN)], PollTimeout::from(LINK_WITHIN))?;
    Ok(())
}

/// A sysfs shows the network namespace in which it was mounted.
fn mount_sysfs() -> Result<(), NetworkError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let made: Result<(), io::Error> = fs::create_dir(SYSFS);
    made.map_err(NetworkError::Namespace)?;
    mount(Some("sysfs"), SYSFS, Some("sysfs"), flags, None::<&str>)
        .map_err(|source| NetworkError::Mount("sysfs", source))?;
    let below = Path::new(cgroup::ROOT).strip_prefix("/sys").map(|path| Path::new(SYSFS).join(path));
    let target = below.unwrap_or_else(|_| SYSFS.into());
    mount(Some(cgroup::ROOT), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|source| NetworkError::Mount("the cgroups", source))
}

/// Keeps a namespace at a path.
fn bind(namespace: &str, path: &'static str) -> Result<(), NetworkError> {
    File::create(path).map_err(NetworkError::Namespace)?;
    mount(Some(namespace), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|source| NetworkError::Mount("the namespace", source))
}
