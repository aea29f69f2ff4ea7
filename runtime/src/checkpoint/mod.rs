//! Checkpoints on disk: a directory of flat files, CRIU's images and `machinen.json`, which says what they are.
//!
//! ```text
//!   save   disk that the guest wrote ── read by extents, hashed, synced ──> DIR/*.img ... DIR/machinen.json (last)
//!   load   DIR ── machinen.json understood, sizes and digests checked ──> disk for the guest to read; memory is checked
//!                 when it is read
//! ```
//! What the guest says about its images (names, sizes, places) is checked before anything of it is used. The manifest is
//! written last: a directory without it is no checkpoint.

mod digest;
mod digested;
mod disk;
mod erofs;
mod error;
mod files;
mod manifest;
mod said;
mod save;

pub use error::CheckpointError;
pub use files::{clear, remove, verify};
pub use manifest::{FORMAT, ImageDigest, MANIFEST, Manifest, Mount, Options};
pub use save::Saved;

pub(crate) use disk::ImageDisk;
pub(crate) use save::{Images, copy, copy_reports, save};
