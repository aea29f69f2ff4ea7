//! Templates: saved VMs that are cloned instead of booting a VM each time.
//!
//! ```text
//!   start ── find(shape) ──┬─ ready ───> the holder's two memfds ──> clone
//!                          ├─ building ─> boot
//!                          └─ absent ──> boot, and when the container runs: request ──> builder process
//!
//!   builder:  lock KEY.lock ── boot, save, seal, hash ── make room ── execute itself as the holder
//!   holder:   publish KEY.json ── hold memory, device state and lock until it is killed
//!             └─ no clone is left, and the memory has grown ── put a copy of it in its place
//! ```
//! A template consists of two sealed memfds, which a process without any other task keeps open. Clones open
//! them through that process's /proc/PID/fd, which only root may do. The template is valid as long as the
//! holder has the lock; without it the template's files are ignored. Files of a file system could not be
//! sealed, and one QEMU that a guest has taken over could change what all later VMs run.
//!
//! The key is a digest of the [`TemplateShape`], which has everything that determines a template's content.
//! Another kernel, image, QEMU, CPU or command line gives another key. A template whose files have changed
//! since is removed when the next one is built.

mod builder;
mod error;
mod hash;
mod holder;
mod manifest;
mod pages;
mod paths;
mod shape;
mod store;
pub(crate) mod working_set;

use machinen_base::reexec::EntryPoint;

pub use builder::{RehearsalDisks, build};
pub use error::TemplateError;
pub use manifest::TemplateManifest;
pub use shape::TemplateShape;
pub use store::{FoundTemplate, ListedTemplate, ReadyTemplate, TemplateStore};

/// The entry points of the processes that build and hold templates.
pub const ENTRY_POINTS: &[EntryPoint] = &[builder::ENTRY_POINT, holder::ENTRY_POINT];
