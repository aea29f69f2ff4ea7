//! The tap device of a VM: the host's end of the guest's network device.
//!
//! A VM has its tap device from birth, because QEMU cannot change the backend of a network device. The device is made in
//! a private namespace, where it is connected to nothing, and is moved to another one when it is known which network
//! the VM belongs to. QEMU has the only descriptor of the device, so the device ends with QEMU.

use std::{io, os::fd::OwnedFd};

use machinen_base::{netns, sys::tap};

/// The name of the device in its first namespace.
pub const TAP_NAME: &str = "tap0";

/// The tap device of a VM.
#[derive(Debug)]
pub struct TapDevice {
    /// The namespace in which the device was made. It has nothing else, and lasts at least as long as the VM.
    pub namespace: OwnedFd,
}

impl TapDevice {
    /// Makes a device in a namespace of its own. Returns it with the descriptor for QEMU.
    pub(crate) fn create() -> io::Result<(Self, OwnedFd)> {
        let (namespace, fd) = netns::inside_new(|| tap::create(TAP_NAME))?;
        Ok((Self { namespace }, fd))
    }
}
