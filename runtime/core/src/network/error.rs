//! The errors of a pod's network.

use std::io;

use machinen_base::error::{ErrorKind, HasKind};
use machinen_netlink::NetlinkError;
use machinen_vm::{VmError, agent::AgentError};

/// Why a VM could not be connected with a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The VM was started without a network device.
    #[error(
        "the container's VM has no network device: load the kernel module tun if this host has no /dev/net/tun, and do not \
         set vm.network_devices to 0"
    )]
    NoDevice,
    /// The namespace cannot be entered.
    #[error("cannot enter the network namespace")]
    Enter(#[source] io::Error),
    /// The kernel refuses.
    #[error("cannot connect the VM with the network namespace")]
    Kernel(#[from] NetlinkError),
    /// A VM is connected already.
    #[error("the network namespace is connected with another VM: each VM needs a namespace of its own")]
    InUse,
    /// There are more interfaces than the VM has.
    #[error(
        "the network namespace has {} interfaces ({}), and the VM has {devices} (vm.network_devices)", names.len(),
        names.join(", ")
    )]
    TooMany {
        /// The number of the VM's network devices.
        devices: usize,
        /// The names of the interfaces.
        names: Vec<String>,
    },
    /// The interface is not one that a VM can have.
    #[error("the network interface {name} has no Ethernet address, which the VM's interface needs")]
    NotEthernet {
        /// The name of the interface.
        name: String,
    },
    /// The pod has a network namespace already.
    #[error("the container's network namespace is not the one of the other containers of its pod")]
    OtherNamespace,
    /// The kernel does not report changes.
    #[error("cannot watch the network namespace")]
    Watch(#[source] io::Error),
    /// The agent refused the configuration.
    #[error("cannot configure the network of the guest")]
    Guest(#[source] AgentError),
    /// The agent cannot be reached.
    #[error("cannot reach the guest agent")]
    Vm(#[source] Box<VmError>),
    /// A thread ended without a result.
    #[error("a worker thread ended early")]
    Worker(#[source] tokio::task::JoinError),
}

impl HasKind for NetworkError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoDevice | Self::InUse | Self::OtherNamespace => ErrorKind::FailedPrecondition,
            Self::TooMany { .. } | Self::NotEthernet { .. } => ErrorKind::Unimplemented,
            Self::Guest(error) => error.kind(),
            Self::Vm(error) => error.kind(),
            _ => ErrorKind::Internal,
        }
    }
}
