//! Checkpoints on disk: a directory of flat files, with CRIU's images and `machinen.json`, which describes
//! them.
//!
//! ```text
//!   save   disk that the guest wrote ── read by extents, hashed, synced ──> DIR/*.img ... DIR/machinen.json (last)
//!   load   DIR ── machinen.json parsed, sizes and digests verified ──> disk for the guest to read; memory is
//!                 verified when it is read
//! ```
//! The guest's report about its images (names, sizes, offsets) is validated before the host uses it. The
//! manifest is written last, so a directory without it has no complete checkpoint. A checkpoint that is written where an
//! earlier one is takes its place as a whole.

mod copies;
mod digest;
mod directory;
mod disk;
mod erofs;
mod error;
mod files;
mod hash_pipeline;
mod manifest;
mod report;
mod save;
mod staged;
mod volumes;

pub use copies::ManifestCopy;
pub use error::CheckpointError;
pub use files::{clear, remove, verify};
pub use manifest::{CheckpointManifest, DumpOptions, FORMAT, ImageDigest, MANIFEST, ManifestMount};
pub use save::SavedCheckpoint;
pub use volumes::ManifestVolume;

pub(crate) use copies::{arrange as arrange_copies, check_base as check_copy_base, open_written};
pub(crate) use disk::ImageDisk;
pub(crate) use manifest::kernel_digest;
pub(crate) use save::{DumpImages, copy, copy_reports, save};
pub(crate) use staged::StagedCheckpoint;
pub(crate) use volumes::check as check_volumes;
