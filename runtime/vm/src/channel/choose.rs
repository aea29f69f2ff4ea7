//! The choice of a VM's channel.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::kernel_vsock;
use crate::{accel::Accelerator, spec::ChannelKind};

/// Which channel the configuration asks for (`vm.channel`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChannelMode {
    /// The kernel's vsock with KVM where the host has it, else serial.
    Auto,
    /// AF_VSOCK in the guest: by the kernel of the host, else by vhost-device-vsock.
    Vsock,
    /// A virtio serial port.
    Serial,
}

/// The channels that this host supports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSupport {
    /// /dev/vhost-vsock can be opened.
    pub kernel_vsock: bool,
    /// The vhost-device-vsock program.
    pub daemon: PathBuf,
}

impl HostSupport {
    /// Tries to open the device of the kernel. `daemon` is taken as it is.
    pub fn detect(daemon: &Path) -> Self {
        let kernel_vsock = File::options().read(true).write(true).open(kernel_vsock::DEVICE).is_ok();
        Self { kernel_vsock, daemon: daemon.to_owned() }
    }
}

/// The channel for the configured value.
///
/// `auto` is the kernel's vsock with KVM where the host has it, else serial. Serial needs no second process for each
/// VM and no shared guest memory, starts sooner than vhost-user, and can be part of a template. A guest that is emulated
/// gains nothing by the kernel's vsock, and its QEMU is kept from more of the kernel without it.
pub fn choose_channel(wanted: ChannelMode, accel: Accelerator, host: &HostSupport) -> ChannelKind {
    match (wanted, accel, host.kernel_vsock) {
        (ChannelMode::Auto, Accelerator::Kvm, true) | (ChannelMode::Vsock, _, true) => {
            ChannelKind::KernelVsock
        }
        (ChannelMode::Vsock, _, false) => ChannelKind::VhostUserVsock { daemon: host.daemon.clone() },
        (ChannelMode::Auto | ChannelMode::Serial, ..) => ChannelKind::Serial,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_prefers_the_kernel_and_then_serial() {
        let with = |kernel_vsock| HostSupport { kernel_vsock, daemon: "d".into() };
        let user = ChannelKind::VhostUserVsock { daemon: "d".into() };
        let choose_channel = |wanted, host: &_| choose_channel(wanted, Accelerator::Kvm, host);
        assert_eq!(choose_channel(ChannelMode::Auto, &with(true)), ChannelKind::KernelVsock);
        assert_eq!(choose_channel(ChannelMode::Vsock, &with(true)), ChannelKind::KernelVsock);
        assert_eq!(choose_channel(ChannelMode::Auto, &with(false)), ChannelKind::Serial);
        assert_eq!(choose_channel(ChannelMode::Vsock, &with(false)), user);
        assert_eq!(choose_channel(ChannelMode::Serial, &with(true)), ChannelKind::Serial);
    }

    #[test]
    fn an_emulated_guest_has_the_kernels_vsock_only_if_it_is_asked_for() {
        let host = HostSupport { kernel_vsock: true, daemon: "d".into() };
        let choose = |wanted| choose_channel(wanted, Accelerator::Tcg { tsc_khz: 1 }, &host);
        assert_eq!(choose(ChannelMode::Auto), ChannelKind::Serial);
        assert_eq!(choose(ChannelMode::Vsock), ChannelKind::KernelVsock);
    }
}
