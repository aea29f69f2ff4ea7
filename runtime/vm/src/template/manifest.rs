//! The description of a template, stored in `KEY.json`.

use serde::{Deserialize, Serialize};

use super::TemplateShape;
use crate::{OriginalQemu, QemuVersion};

/// Raised when a field changes its meaning; templates of other versions are built again.
pub(super) const VERSION: u32 = 3;

/// The description of a published template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateManifest {
    pub(super) version: u32,
    /// What determines the content of the template.
    pub shape: TemplateShape,
    /// The holder's pid.
    pub pid: u32,
    /// The version of QEMU that saved the state.
    pub qemu: QemuVersion,
    /// The number under which QEMU has opened the memory.
    pub(super) memory_fd: i32,
    /// The QEMU that clones are twins of, or why there is none.
    pub original: Result<OriginalQemu, String>,
    /// The memory size of the VM, MiB.
    pub memory_mib: u32,
    /// The number of CPUs of the VM.
    pub vcpus: u32,
    /// Bytes of memory that were in use, which is what the template costs the host.
    pub allocated: u64,
    /// Bytes of memory that the original took when it had been prepared, besides the VM's memory; 0 without one.
    pub original_memory: u64,
    /// Bytes of device state.
    pub devices: u64,
    /// Digest of both, see [`super::hash`].
    pub(super) sha256: String,
    /// Seconds since 1970.
    pub created: u64,
}
