//! The protocol between machinen's host side and its guest agent.
//!
//! This crate does no I/O. It holds the only copy of every name, number and layout that both sides must agree
//! on: the ttrpc messages ([`api`], from `proto/agent.proto`), the disks of a root file system ([`disks`]), the
//! kinds of errors ([`error`]), the first bytes of each stream ([`preamble`]), the names of processes
//! ([`process`]), the archive of a container's changes ([`layer`]), the messages about its files ([`fuse`]), the
//! volumes of the host ([`shares`]) and copies of its directories ([`copies`]), the queries for names ([`nameservers`]), the
//! connections to localhost ([`localhost`]) and to sockets of the host ([`sockets`]), the addresses below, and the [`VERSION`] that is checked before anything else.
//!
//! ```text
//!   host                                             guest agent
//!    | <---- control stream: preamble, then ttrpc ----- |   the guest dials when it is ready
//!    | ----- raw streams: stdio, archives, files -----> |   the host dials, preamble carries a token
//!    | <---- wake port: "waiting", "continue" --------> |   templates and clones only, before all else
//! ```

#![deny(unsafe_code)]
#![warn(missing_docs, unreachable_pub)]

pub mod copies;
pub mod disks;
pub mod error;
pub mod fuse;
pub mod layer;
pub mod localhost;
pub mod nameservers;
pub mod preamble;
pub mod process;
pub mod secrets;
pub mod shares;
pub mod sockets;
pub mod tail;

use std::time::Duration;

/// Generated messages and the ttrpc service of `proto/agent.proto`.
#[allow(
    clippy::all,
    clippy::allow_attributes,
    clippy::semicolon_if_nothing_returned,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    rust_2018_idioms,
    unreachable_pub,
    unused_qualifications,
    reason = "generated code"
)]
pub mod api {
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/agent/api.rs"));
    }
    pub use generated::agent::*;
    pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};
}

/// Version of the whole protocol: messages, preamble and their meaning. Every incompatible change moves it.
pub const VERSION: u16 = 10;

/// Most processes in the answer to ListProcesses.
pub const MAX_LISTED_PROCESSES: usize = 1024;
/// Most bytes of a process's command in the answer to ListProcesses.
pub const MAX_COMMAND: usize = 512;

/// How long an OCI hook may take whose configuration has no timeout, on the host and in the guest.
pub const HOOK_PATIENCE: Duration = Duration::from_secs(120);

/// The program in the VM's own root file system that only waits, and reaps the processes that are left to it.
pub const PAUSE: &str = "/pause";

/// [`control_port`] of the first guest CID, which is 3.
pub const CONTROL_PORT: u32 = 1024;

/// AF_VSOCK port on the host (CID 2) that the agent of the guest with this CID dials to open its control
/// stream.
///
/// All VMs of a host share the host's ports, and a separate process serves each VM: a port for each CID keeps
/// them apart. With vhost-user-vsock the host listens on the Unix socket `<uds>_<port>`.
pub const fn control_port(guest_cid: u32) -> u32 {
    CONTROL_PORT.wrapping_add(guest_cid).wrapping_sub(3)
}

/// AF_VSOCK port in the guest where the agent accepts raw streams.
pub const STREAM_PORT: u32 = 1025;

/// Name of the virtserialport that carries all streams as yamux where there is no vsock device.
/// The guest finds it by `/sys/class/virtio-ports/*/name`.
pub const SERIAL_PORT_NAME: &str = "io.machinen.agent";

/// Name of the virtserialport on which the agent of a template waits to be woken (see
/// [`preamble::StreamKind::Waiting`]). Templates and their clones have this port, other VMs do not.
pub const WAKE_PORT_NAME: &str = "io.machinen.wake";

/// Word on the kernel command line that makes the agent wait on the wake port before it dials the host.
pub const TEMPLATE_ARG: &str = "machinen.template";

/// Largest ttrpc message either side sends or accepts, bytes.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Most raw streams that may wait in the agent until a call claims them.
pub const MAX_UNCLAIMED_STREAMS: usize = 64;

/// Key on the kernel command line that selects the agent's channel: `machinen.channel=vsock|serial`.
pub const CHANNEL_ARG: &str = "machinen.channel";
