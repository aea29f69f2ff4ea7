//! Everything that is QEMU's own: its command line, its monitor protocol, its saved states, its version.
//!
//! The rest of the crate speaks of VMs; a second VMM would be a folder next to this one.

pub(crate) mod argv;
pub(crate) mod growth;
pub(crate) mod hotplug;
pub(crate) mod jail;
pub(crate) mod launch;
pub(crate) mod qmp;
pub(crate) mod slots;
pub(crate) mod snapshot;
mod syscalls;
mod twin;
pub(crate) mod version;
