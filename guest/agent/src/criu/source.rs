//! A container, as far as CRIU's dump of it needs to know.

use std::path::Path;

use crate::{cgroup::Cgroup, process::Process};

/// What is to be dumped.
#[derive(Debug)]
pub(crate) struct DumpSource<'a> {
    pub(crate) init: &'a Process,
    /// All of it is frozen.
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) rootfs: &'a Path,
    /// The agent's directory of the container.
    pub(crate) dir: &'a Path,
}
