//! The tap devices of a VM: the host's ends of the guest's network devices.
//!
//! A VM has its tap devices from birth, because QEMU cannot change the backend of a network device. The devices are made
//! in a private namespace, where they are connected to nothing. One is moved to another namespace when it is known which
//! network it belongs to. A device ends with its last descriptor, of which QEMU has one and this process another.
//!
//! The packets of a device are moved between the tap and the guest's memory by QEMU, or by the host's kernel (vhost-net),
//! to which QEMU hands the tap over by a descriptor of /dev/vhost-net.

use std::{fs::File, io, os::fd::OwnedFd, thread};

use machinen_base::{netns, sys::tap};

/// The name of a device in its first namespace, by the number of the guest's network device.
pub fn tap_name(nic: u32) -> String {
    format!("tap{nic}")
}

const VHOST: &str = "/dev/vhost-net";

/// Opens the host kernel's mover of packets, for one device.
pub(crate) fn open_vhost() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(VHOST)?.into())
}

/// Whether the host's kernel can move packets between a tap and a guest (vhost-net): the file exists, and may be opened.
///
/// # Errors
/// It does not exist, or may not be opened.
pub fn try_vhost() -> io::Result<()> {
    open_vhost().map(drop)
}

/// Sets a device up as QEMU does when the guest's driver has started, for a QEMU that does not do so any more.
pub(crate) fn prepare_for_guest(device: &OwnedFd) -> io::Result<()> {
    tap::set_header(device, VIRTIO_HEADER)?;
    tap::set_offloads(device)
}

/// Length of the header of virtio 1's packets, bytes.
const VIRTIO_HEADER: i32 = 12;

/// The tap devices of a VM.
#[derive(Debug)]
pub struct TapDevices {
    /// The namespace in which the devices were made. It has nothing else, and lasts at least as long as the VM.
    pub namespace: OwnedFd,
    /// The kernel takes some 40 ms to close the last descriptor of a device. The end of a QEMU, which has another one,
    /// must not wait for that.
    devices: Vec<OwnedFd>,
}

impl TapDevices {
    /// Makes devices in a namespace of their own. Returns them with the descriptors for QEMU.
    pub(crate) fn create(count: u32) -> io::Result<(Self, Vec<OwnedFd>)> {
        let make = || (0..count).map(|nic| tap::create(&tap_name(nic))).collect::<io::Result<Vec<_>>>();
        let (namespace, fds) = netns::inside_new(make)?;
        let devices = fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        Ok((Self { namespace, devices }, fds))
    }

    /// The number of the devices.
    pub fn count(&self) -> u32 {
        u32::try_from(self.devices.len()).expect("there are few")
    }
}

impl Drop for TapDevices {
    fn drop(&mut self) {
        let devices = std::mem::take(&mut self.devices);
        // Without another thread the descriptors are closed here.
        if let Err(error) = thread::Builder::new().name("tap".to_owned()).spawn(move || drop(devices)) {
            tracing::debug!("tap devices are closed without a thread: {error}");
        }
    }
}
