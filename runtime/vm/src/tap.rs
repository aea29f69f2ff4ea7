//! The tap device of a VM: the host's end of the guest's network device.
//!
//! A VM has its tap device from birth, because QEMU cannot change the backend of a network device. The device is made in
//! a private namespace, where it is connected to nothing, and is moved to another one when it is known which network
//! the VM belongs to. The device ends with its last descriptor, of which QEMU has one and this process another.

use std::{io, os::fd::OwnedFd, thread};

use machinen_base::{netns, sys::tap};

/// The name of the device in its first namespace.
pub const TAP_NAME: &str = "tap0";

/// The tap device of a VM.
#[derive(Debug)]
pub struct TapDevice {
    /// The namespace in which the device was made. It has nothing else, and lasts at least as long as the VM.
    pub namespace: OwnedFd,
    /// The kernel takes some 40 ms to close the last descriptor of a device. The end of a QEMU, which has another one,
    /// must not wait for that.
    device: Option<OwnedFd>,
}

impl TapDevice {
    /// Makes a device in a namespace of its own. Returns it with the descriptor for QEMU.
    pub(crate) fn create() -> io::Result<(Self, OwnedFd)> {
        let (namespace, fd) = netns::inside_new(|| tap::create(TAP_NAME))?;
        let device = Some(fd.try_clone()?);
        Ok((Self { namespace, device }, fd))
    }
}

impl Drop for TapDevice {
    fn drop(&mut self) {
        let device = self.device.take();
        // Without another thread the descriptor is closed here.
        if let Err(error) = thread::Builder::new().name("tap".to_owned()).spawn(move || drop(device)) {
            tracing::debug!("a tap device is closed without a thread: {error}");
        }
    }
}
