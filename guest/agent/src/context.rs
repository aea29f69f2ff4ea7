//! What containers and their processes are made with.
//!
//! A function that needs one or two of these parts takes those, and not the whole [`Context`].

use crate::{
    cgroup::DeviceFilters, channel::Unclaimed, disk::DiskSource, engine::Engine, network::Network,
    reaper::Reaper,
};

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) engine: Engine,
    pub(crate) reaper: Reaper,
    pub(crate) unclaimed: Unclaimed,
    pub(crate) disks: DiskSource,
    pub(crate) device_filters: DeviceFilters,
    pub(crate) network: Network,
}
