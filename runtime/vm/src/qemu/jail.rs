//! The jail of QEMU: what QEMU may use and see, since a guest may have taken it over.

use machinen_base::process::{Jail, ResourceLimits};

use crate::{
    qemu::argv::{self, Start},
    spec::VmSpec,
};

/// Each of a VM's disks takes two descriptors of QEMU, and a controller has 256 disks.
const OPEN_FILES: u64 = 1024;

/// QEMU's threads besides those of the vCPUs: at most 64 that read and write disks, and a few for its event loop, RCU,
/// and the state of a VM.
const THREADS: u64 = 128;

/// The restrictions of a QEMU that runs `spec`.
pub(crate) fn jail(spec: &VmSpec, start: Start) -> Jail {
    let limits = ResourceLimits {
        // Disks raise it when they are attached.
        file_size: Some(argv::own_memory_file(spec, start)),
        open_files: Some(OPEN_FILES),
        processes: Some(u64::from(spec.vcpus) + THREADS),
        locked_memory: Some(0),
    };
    Jail { limits, ..Jail::strict(spec.identity.clone()) }
}
