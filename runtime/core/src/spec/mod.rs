//! Translates an OCI bundle on the host to what the guest's agent receives.
//!
//! ```text
//!   config.json --bundle::load--> Spec --guest::reduce--> GuestSpec (JSON for the agent, injected files, volumes)
//!   Process     --exec::reduce--> Process
//!   LinuxResources --resources::writes--> files of the container's cgroup
//! ```
//! Everything except `bundle::load` is pure.

pub mod bundle;
pub mod cpus;
pub mod disks;
pub mod exec;
pub mod guest;
pub mod hooks;
mod json;
pub mod resources;
pub mod volumes;

pub(crate) use json::CAPABILITIES;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// The newest version of the runtime-spec that is followed.
pub const OCI_VERSION: &str = "1.2.0";

/// Longest hostname that Linux takes, bytes (gethostname(2)).
pub const MAX_HOSTNAME: usize = 64;

/// Whether the container has a namespace of this kind of its own.
pub fn has_own(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let own = namespaces.into_iter().flatten().find(|namespace| namespace.typ() == kind);
    own.is_some_and(|namespace| namespace.path().is_none())
}
