//! Checkpoints on disk: a directory of flat files, CRIU's images and `machinen.json`, which says what they are.
//!
//! ```text
//!   save   disk that the guest wrote ── read by extents, hashed, synced ──> DIR/*.img ... DIR/machinen.json (last)
//!   load   DIR ── machinen.json understood, every size and digest checked ──> disk for the guest to read
//! ```
//! What the guest says about its images (names, sizes, places) is checked before anything of it is used. The manifest is
//! written last: a directory without it is no checkpoint.

mod disk;
mod error;
mod manifest;
mod save;

pub use disk::{remove, verify};
pub use error::CheckpointError;
pub use manifest::{FORMAT, ImageDigest, MANIFEST, Manifest, Mount, Options};
pub use save::Saved;

pub(crate) use disk::image_disk;
pub(crate) use save::{Images, copy, copy_reports, save};
