//! The files of a template.
//!
//! ```text
//!   KEY.lock     held by the builder, then by the holder; its time is that of the last clone
//!   KEY.json     the manifest; counts only while the lock is held
//!   KEY.used     a fifo that the owner of each clone has open for writing: its end shows that no clone is left
//!   KEY.failed   why the last attempt to build failed
//!   KEY.lost     a byte for each clone that was lost since one has worked
//!   KEY.turn     is locked by the process that makes a clone of the template's QEMU
//!   KEY.pages    what clones write to first; see `working_set`
//!   KEY.vm/      while the template's VM runs
//! ```

use std::path::{Path, PathBuf};

/// The files of one template.
#[derive(Debug)]
pub(super) struct TemplatePaths {
    base: PathBuf,
}

impl TemplatePaths {
    pub(super) fn new(dir: &Path, key: &str) -> Self {
        Self { base: dir.join(key) }
    }

    pub(super) fn manifest(&self) -> PathBuf {
        self.base.with_extension("json")
    }

    pub(super) fn unpublished(&self) -> PathBuf {
        self.base.with_extension("json.new")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.base.with_extension("lock")
    }

    pub(super) fn used(&self) -> PathBuf {
        self.base.with_extension("used")
    }

    pub(super) fn failed(&self) -> PathBuf {
        self.base.with_extension("failed")
    }

    pub(super) fn lost(&self) -> PathBuf {
        self.base.with_extension("lost")
    }

    pub(super) fn turn(&self) -> PathBuf {
        self.base.with_extension("turn")
    }

    pub(super) fn vm(&self) -> PathBuf {
        self.base.with_extension("vm")
    }

    pub(super) fn pages(&self) -> PathBuf {
        self.base.with_extension("pages")
    }

    /// All files, the lock last.
    pub(super) fn all(&self) -> [PathBuf; 8] {
        [
            self.manifest(),
            self.unpublished(),
            self.used(),
            self.failed(),
            self.lost(),
            self.turn(),
            self.pages(),
            self.lock(),
        ]
    }
}
