//! What is known of a template, in `KEY.json`.

use serde::{Deserialize, Serialize};

use super::Shape;
use crate::vm::QemuVersion;

/// Moved when a field changes its meaning; templates of other versions are built anew.
pub(super) const VERSION: u32 = 1;

/// A published template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateManifest {
    pub(super) version: u32,
    pub shape: Shape,
    /// The holder.
    pub pid: u32,
    pub qemu: QemuVersion,
    /// QEMU's own number for the memory.
    pub(super) memory_fd: i32,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// Bytes of memory that were in use, which is what the template costs the host.
    pub allocated: u64,
    /// Bytes of device state.
    pub devices: u64,
    /// Digest of both, see [`super::hash`].
    pub(super) sha256: String,
    /// Seconds since 1970.
    pub created: u64,
}
