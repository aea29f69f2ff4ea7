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
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use super::{Namespace, NetworkError, OWN, apply, in_new_namespace};
use crate::{cgroup, sys};

/// The name that nearly every container's interface has.
const NAME: &str = "eth0";
/// The namespace, for comparison, and its sysfs.
const NAMESPACE: &str = "/run/machinen-network";
const SYSFS: &str = "/run/machinen-sys";

#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) namespace: Namespace,
    /// The device as it is there.
    pub(super) interface: Interface,
}

impl Prepared {
    /// Makes the namespace. `own`: the namespace of this thread; `device`: the name of the device in the namespace of the
    /// socket.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn make(own: &File, hidden: &mut NetlinkSocket, device: &str) -> Result<Self, NetworkError> {
        let made = in_new_namespace(own, || {
            let mut namespace = Namespace::of_this_thread().map_err(NetworkError::Namespace)?;
            loopback_up().map_err(|source| NetworkError::Namespace(source.into()))?;
            hidden.move_to(device, namespace.file.as_fd(), NAME)?;
            let interface = apply::switch_on(&mut namespace.socket, NAME)?;
            mount_sysfs()?;
            bind(OWN, NAMESPACE)?;
            Ok(Self { namespace, interface })
        });
        made.map_err(NetworkError::Namespace)?
    }
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
