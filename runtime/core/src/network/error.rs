//! The errors of a pod's network.

use std::{io, path::PathBuf};

use machinen_base::{
    error::{ErrorKind, HasKind},
    fs::FileError,
    process::ProcessError,
};
use machinen_netlink::NetlinkError;
use machinen_vm::{VmError, agent::AgentError};

use crate::config::ports::PublishedPort;

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
    #[error(
        "the network namespace is connected with another VM: each VM needs a namespace of its own, and containers that \
         share one must be in one pod"
    )]
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
    /// There are more interfaces than packets can be routed to.
    #[error(
        "the network namespace has {} interfaces ({}), and a container with the annotation io.machinen.network=routed can \
         have one", names.len(), names.join(", ")
    )]
    SeveralRouted {
        /// The names of the interfaces.
        names: Vec<String>,
    },
    /// The routed mode needs a namespace that somebody else makes.
    #[error(
        "the annotation io.machinen.network=routed is for a container with a network namespace of its own that others \
         connect, and not for the host's network or published ports (io.machinen.ports)"
    )]
    NothingToRoute,
    /// The kernel cannot find out which packets are for the guest.
    #[error(
        "the annotation io.machinen.network=routed needs nf_tables of the host's kernel (modules nf_tables, nft_socket)"
    )]
    Mark(#[source] NetlinkError),
    /// A setting of the namespace cannot be changed.
    #[error("cannot set {path} to {value} in the network namespace")]
    Setting {
        /// The file of the setting.
        path: String,
        /// The value.
        value: String,
        /// What the kernel has answered.
        source: io::Error,
    },
    /// The settings of the namespace cannot be read.
    #[error("cannot read the settings of the network namespace")]
    Settings(#[source] io::Error),
    /// The interface is not one that a VM can have.
    #[error("the network interface {name} has no Ethernet address, which the VM's interface needs")]
    NotEthernet {
        /// The name of the interface.
        name: String,
    },
    /// The pod has a network namespace already.
    #[error("the container's network namespace is not the one of the other containers of its pod")]
    OtherNamespace,
    /// The configuration asks for the host's own network.
    #[error(
        "the configuration asks for the host's own network, which a container in a VM cannot have: give it a network \
         namespace, or connections to the outside by the annotation io.machinen.network=pasta (for all such containers: \
         network.host in machinen's configuration), and publish ports by io.machinen.ports"
    )]
    Host,
    /// A published port needs a network that machinen makes.
    #[error(
        "the annotations io.machinen.network and io.machinen.ports are for containers without a network namespace, and \
         the configuration names {}: publish ports where that network is made", path.display()
    )]
    NamesNamespace {
        /// The path of the namespace.
        path: PathBuf,
    },
    /// The pod has another network already.
    #[error(
        "the container's pod has its network already: give the annotations io.machinen.network and io.machinen.ports to \
         the pod's first container, or the same ones to all"
    )]
    OtherPorts,
    /// A port of the host cannot be published.
    #[error("cannot publish the port {port}")]
    Publish {
        /// The port.
        port: PublishedPort,
        /// What bind(2) has answered, such as that the address is in use.
        source: io::Error,
    },
    /// There is no user for pasta.
    #[error("cannot reserve a user for pasta")]
    User(#[source] FileError),
    /// pasta cannot be started.
    #[error("cannot start pasta, which connects the container with the outside")]
    Pasta(#[source] ProcessError),
    /// The streams of pasta cannot be made.
    #[error("cannot reach pasta")]
    PastaStreams(#[source] io::Error),
    /// pasta has ended before it was ready.
    #[error("pasta, which connects the container with the outside, has failed: {printed}")]
    PastaEnded {
        /// Its messages.
        printed: String,
    },
    /// pasta does not become ready.
    #[error("pasta, which connects the container with the outside, was not ready after {seconds} s")]
    PastaHangs {
        /// How long it was waited for.
        seconds: u64,
    },
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
            Self::NoDevice | Self::InUse | Self::OtherNamespace | Self::Mark(_) => {
                ErrorKind::FailedPrecondition
            }
            Self::TooMany { .. } | Self::SeveralRouted { .. } | Self::NotEthernet { .. } | Self::Host => {
                ErrorKind::Unimplemented
            }
            Self::NamesNamespace { .. } | Self::OtherPorts | Self::NothingToRoute => {
                ErrorKind::InvalidArgument
            }
            Self::Publish { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                ErrorKind::FailedPrecondition
            }
            Self::Publish { source, .. } => ErrorKind::of_io(source),
            Self::Pasta(ProcessError::NotFound { .. }) => ErrorKind::FailedPrecondition,
            Self::Guest(error) => error.kind(),
            Self::Vm(error) => error.kind(),
            _ => ErrorKind::Internal,
        }
    }
}
