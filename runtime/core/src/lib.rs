//! machinen's library: pods and their containers, and everything else that the shim and the command line share.
//!
//! Arrows point downward only: `shim, cli -> core -> vm, storage -> base -> protocol`. ARCHITECTURE.md holds the map.

#![warn(missing_docs)]

pub mod checkpoint;
pub mod config;
pub mod features;
pub mod hooks;
pub mod host_cgroup;
pub mod network;
pub mod pod;
pub mod pool;
pub mod shares;
pub mod spec;
pub mod traces;
pub mod view;

use std::path::PathBuf;

pub use config::annotations;
pub use machinen_base::{cgroup, confined, error, fs, owner, process, reexec, sys, text, watch};
pub use machinen_protocol::secrets;
pub use machinen_storage::{container_disk, layer, rootdisk};
pub use machinen_vm as vm;
pub use machinen_vm::{accel, admission, agent, assets, template};

/// The directory in which all starting VMs of this host reserve their memory.
pub(crate) fn reservations_dir() -> PathBuf {
    owner::run_dir().join("starting")
}
